"""Asks the base model and the fine-tuned model and judges their answers: `python -m eval.run --run runs/…`.

This command prints the reference's table with our columns in it. It writes eval.json and answers.jsonl into the run
folder and draws the run's report.html again.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from data.chat import prompt_ids
from data.conversation import Row
from data.errors import UserError
from data.examples import Example
from data.rows import Problems, read_rows
from eval.answers.generate import generate, load_model, timed
from eval.answers.vllm_backend import ask_vllm, check_vllm
from eval.check import Verdict, check_answer, check_exact, number_asked
from eval.reference import PUBLISHED_ANSWERS
from eval.reporting.markdown import markdown_table
from loop.guard.process import RunError, end_process, exit_codes
from loop.measure.memory import memory_in_use, peak_memory
from loop.model.build import build_template, build_tokenizer, check_model
from loop.model.limits import check_limits
from loop.recipe import ROOT, Recipe, find_model, find_path, parse_recipe
from loop.saving.finished import check_adapter, check_content, finished_recipe
from loop.saving.run_folder import write_json

JUDGES: dict[str, Callable[[Row, str], Verdict]] = {
    "sums": lambda row, answer: check_answer(number_asked(row.question), answer),
    "exact": lambda row, answer: check_exact(row.answer, answer),
}
SHOWN_ANSWERS = 3  # answers of each model that are printed


@dataclass(frozen=True)
class Question:
    """Says what one worker process has to do: which model to ask, how, and with which rows."""

    label: str  # base or tuned
    recipe: Recipe
    adapter: Path | None
    merge: bool
    rows: list[Row]
    batch_size: int | None  # None stands for as many prompts as fit into memory
    max_new_tokens: int
    backend: str = "transformers"
    verify: int = 0  # the first so many rows are asked once more, one at a time
    judge: str = "sums"


@dataclass(frozen=True)
class Score:
    """Holds the result of one model, as eval.json has it."""

    accuracy: float  # share of all rows whose answer has the prefix and a + b = x
    prefix_rate: float  # share of all rows whose answer has the prefix
    seconds: float  # time to generate all answers, without loading the model
    tokens_per_second: float  # generated tokens, end tokens included
    peak_load_bytes: int | None  # GPU memory, or resident host memory without a GPU; None if not known
    peak_inference_bytes: int | None  # memory beyond what the loaded model takes
    verified: int = 0  # number of rows that were asked once more, one at a time
    different: int = 0  # number of these rows whose second answer differs


@dataclass(frozen=True)
class Asked:
    """Holds the answers of one process to its share of the rows, and what they cost."""

    answers: list[str]
    num_tokens: int
    seconds: float
    peak_load: int | None
    peak_inference: int | None
    different: int = 0  # number of the first `verify` rows that get another answer when asked one at a time


def ask(question: Question) -> Asked:
    """Asks one model its rows. This function runs in a worker process."""
    if question.backend == "vllm":
        answers, num_tokens, seconds = ask_vllm(question)
        return Asked(answers, num_tokens, seconds, None, None)
    if torch.cuda.is_available():
        # peak_memory() and timed() look at the current GPU.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    peak_memory()  # the peak counts from here on
    recipe, tokenizer = question.recipe, build_tokenizer(question.recipe)
    name = find_model(recipe.model.name_or_path)
    model = load_model(name, question.adapter, question.merge, recipe.model.trust_remote_code)
    peak_load = peak_memory()
    template = build_template(recipe, tokenizer)
    prompts = [prompt_ids(row, template) for row in question.rows]
    stops = template.stop_tokens(model.generation_config)
    peak_memory()  # the peak counts from here on
    held = memory_in_use()
    with tqdm(total=len(prompts), desc=question.label, unit="prompt", disable=not sys.stderr.isatty()) as bar:
        (answers, num_tokens), seconds = timed(
            lambda: generate(
                model, tokenizer, prompts, stops, question.batch_size, question.max_new_tokens, progress=bar.update
            )
        )
    peak = peak_memory()
    peak_inference = peak - held if peak is not None and held is not None else None
    alone = [
        generate(model, tokenizer, [p], stops, 1, question.max_new_tokens)[0][0] for p in prompts[: question.verify]
    ]
    different = sum(a != b for a, b in zip(alone, answers[: question.verify], strict=True))
    return Asked(answers, num_tokens, seconds, peak_load, peak_inference, different)


def ask_everywhere(question: Question) -> Asked:
    """Asks all rows: each rank asks its share, in a fresh worker process, and gets the answers of all ranks.

    The worker is fresh so that the memory of one model does not count for the next. Every rank has to call this
    function.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    share = replace(question, rows=question.rows[rank::ranks], verify=len(range(rank, question.verify, ranks)))
    mine: Asked | Exception
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            mine = pool.submit(ask, share).result() if share.rows else Asked([], 0, 0.0, None, None)
    except Exception as error:  # the other ranks would wait for this rank
        mine = error
    everyone: list[Asked] = []
    for number, each in enumerate(gather_object([mine]) if ranks > 1 else [mine]):  # a collective
        if isinstance(each, Exception):
            raise each if number == rank else RunError(f"rank {number} could not answer: {each}")
        everyone.append(each)
    answers = [""] * len(question.rows)
    for number, each in enumerate(everyone):
        answers[number::ranks] = each.answers
    return Asked(
        answers,
        sum(each.num_tokens for each in everyone),
        max(each.seconds for each in everyone),
        max((each.peak_load for each in everyone if each.peak_load is not None), default=None),
        max((each.peak_inference for each in everyone if each.peak_inference is not None), default=None),
        sum(each.different for each in everyone),
    )


def evaluate(question: Question) -> tuple[Score, list[tuple[Row, str, Verdict]]]:
    """Asks all rows and judges the answers. Every rank has to call this function."""
    asked = ask_everywhere(question)
    judge = JUDGES[question.judge]
    judged = [(row, answer, judge(row, answer)) for row, answer in zip(question.rows, asked.answers, strict=True)]
    score = Score(
        accuracy=sum(verdict.right for _, _, verdict in judged) / len(judged),
        prefix_rate=sum(verdict.prefix for _, _, verdict in judged) / len(judged),
        seconds=asked.seconds,
        tokens_per_second=asked.num_tokens / asked.seconds,
        peak_load_bytes=asked.peak_load,
        peak_inference_bytes=asked.peak_inference,
        verified=min(question.verify, len(question.rows)),
        different=asked.different,
    )
    return score, judged


def table(scores: dict[str, Score], num_rows: int, batch_size: int | None, judge: str = "sums") -> str:
    """Returns our results as a Markdown table; in the reference's task beside those of the reference."""
    ours = f"{num_rows}, {batch_size or 'what fits'}"
    published = PUBLISHED_ANSWERS if judge == "sums" else {}
    columns: list[dict[str, Any]] = [*published.values(), *(asdict(score) for score in scores.values())]
    rows = [
        ("prompts, batch size", ["20, 1"] * len(published) + [ours] * len(scores)),
        ("accuracy", [f"{c['accuracy']:.3f}" for c in columns]),
        ("prefix right", [f"{c['prefix_rate']:.3f}" if "prefix_rate" in c else "–" for c in columns]),
        ("seconds", [f"{c['seconds']:.2f}" for c in columns]),
        ("tokens a second", [f"{c['tokens_per_second']:.1f}" for c in columns]),
        ("peak memory, loading, MB", [_megabytes(c["peak_load_bytes"]) for c in columns]),
        ("peak memory, inference beyond that, MB", [_megabytes(c["peak_inference_bytes"]) for c in columns]),
    ]
    if judge != "sums":
        rows = [row for row in rows if row[0] != "prefix right"]
    names = [f"reference, {label}" for label in published] + [f"ours, {label}" for label in scores]
    return markdown_table(["", *names], [[name, *cells] for name, cells in rows])


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f}"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options of this command. Raises UserError for values that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run folder of a training: asks its base and its fine-tuned model")
    which.add_argument("--config", type=Path, help="a recipe: asks its base model only and writes nothing")
    parser.add_argument(
        "--model.name_or_path", dest="model", metavar="PATH", help="where the base model lies now, if it was moved"
    )
    parser.add_argument("--adapter-only", action="store_true", help="with --run: ask the fine-tuned model alone")
    parser.add_argument("--data", default=str(ROOT / "data/math/math_eval_200.json"), help="rows to ask")
    parser.add_argument(
        "--judge", choices=tuple(JUDGES), default="sums", help="sums: the reference task; exact: the row's own answer"
    )
    parser.add_argument("--limit", type=int, help="ask only the first so many rows")
    parser.add_argument("--batch-size", type=int, help="prompts generated at once (default: what fits into memory)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens after which an answer is cut off")
    parser.add_argument("--no-merge", action="store_true", help="keep the adapter beside the weights")
    parser.add_argument("--verify", type=int, default=0, help="ask the first so many again, one at a time, and compare")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="what generates")
    args = parser.parse_args(argv)
    if args.backend == "vllm":
        check_vllm(args.verify, args.no_merge)
    if args.adapter_only and not args.run:
        raise UserError("--adapter-only goes with --run, the folder of a training: a recipe alone has no adapter.")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but has to be at least 1.")
    return args


def questions(args: argparse.Namespace) -> list[Question]:
    """Returns one question for each model to ask. Raises UserError when the run, recipe, model or rows are missing."""
    if args.run:
        recipe = finished_recipe(args.run, args.model)
    else:
        moved = ["--model.name_or_path", args.model] if args.model else []
        recipe = parse_recipe(["--config", str(args.config), *moved])[1]
    path = find_path(args.data)
    rows = read_rows(path, recipe.data.columns)[: args.limit]
    problems = Problems()
    for row in rows if args.judge == "sums" else ():
        problem = _not_a_question(row)
        problems.add(f"row {row.number}: {problem}" if problem else None)
    problems.fail(path)
    adapters: dict[str, Path | None] = {} if args.adapter_only else {"base": None}
    adapted = check_model(recipe)  # a bad recipe fails here rather than in a worker
    _check_prompts(adapted.get_base_model(), rows, recipe, args.max_new_tokens)
    if args.run:
        check_content(args.run, recipe)
        adapters["tuned"] = args.run / "adapter"
        check_adapter(args.run, adapted)
    return [
        Question(
            label=label,
            recipe=recipe,
            adapter=adapter,
            merge=not args.no_merge,
            rows=rows,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            backend=args.backend,
            verify=args.verify,
            judge=args.judge,
        )
        for label, adapter in adapters.items()
    ]


def _check_prompts(base: Any, rows: Sequence[Row], recipe: Recipe, max_new_tokens: int) -> None:
    """Raises UserError where a prompt has a token that the model does not know, or is too long with its answer."""
    template = build_template(recipe, build_tokenizer(recipe))
    prompts = [prompt_ids(row, template) for row in rows]
    # The first token stands for each of the answer's.
    examples = [Example.of(row.number, ids, ids[:1] * max_new_tokens) for row, ids in zip(rows, prompts, strict=True)]
    if warning := check_limits(base, [examples]):
        print(f"warning: {warning}.", flush=True)


def _not_a_question(row: Row) -> str | None:
    """Says why a row is no question of the reference task; returns None for a question."""
    try:
        number_asked(row.question)
    except UserError as error:
        return str(error)
    return None


def write_results(run_dir: Path, scores: dict[str, Score], lines: Sequence[str]) -> None:
    """Writes the evaluation into the run folder and draws the run's report, which shows the evaluation.

    `lines` are the lines of answers.jsonl.
    """
    (run_dir / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(run_dir / "eval.json", {label: asdict(score) for label, score in scores.items()})
    print(f"\nevery answer: {run_dir / 'answers.jsonl'}\nrun folder: {run_dir}")
    try:
        # The import stands here because the workers import this file too: matplotlib would add to their peak memory.
        from eval.report import write_run_report

        write_run_report([run_dir], run_dir)
    except Exception as error:  # the evaluation is written; a missing drawing does not make it fail
        print(f"warning: no report: {error}", flush=True)
    else:
        print(f"report: {run_dir / 'report.html'}")


@exit_codes()
def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    to_ask = questions(args)
    main_process = os.environ.get("RANK", "0") == "0"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True)  # these processes exchange only text; their workers use the GPUs
    scores: dict[str, Score] = {}
    lines = []
    for question in to_ask:
        if main_process:
            print(f"asking the {question.label} model {len(question.rows)} questions …", flush=True)
        scores[question.label], judged = evaluate(question)
        for number, (row, answer, verdict) in enumerate(judged):
            line = {"model": question.label, "instruction": row.question, "answer": answer, **asdict(verdict)}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            if main_process and number < SHOWN_ANSWERS:
                print(f"  {row.question}  {answer!r}  {verdict.reason or 'right'}")
    if not main_process:
        return
    print(f"\n{table(scores, len(to_ask[0].rows), args.batch_size, args.judge)}")
    for label, score in scores.items():
        if score.verified:
            print(f"{label}: {score.different} of {score.verified} answers differ from those asked for one at a time")
    if args.run:
        write_results(args.run, scores, lines)


if __name__ == "__main__":
    end_process(main)
