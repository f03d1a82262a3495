"""Before and after: `python -m eval.run --run runs/…` judges the base and the fine-tuned model.

Prints the reference's table with ours in it; writes eval.json and answers.jsonl into the run folder.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tqdm import tqdm

from data.chat import render_prompt, user_text
from data.errors import UserError, exit_codes
from data.rows import Row, fail_on_bad_rows, read_rows
from eval.check import Verdict, check_answer, number_asked
from eval.findings import PUBLISHED_ANSWERS
from eval.generate import PeakMemory, generate, load_model, load_tokenizer, timed
from loop.build import build_tokenizer, check_model
from loop.checkpoint import ADAPTER, first_difference
from loop.recipe import ROOT, find_model, find_path, parse_recipe
from loop.run_folder import write_json

SAMPLES = 3  # answers shown of each model


@dataclass(frozen=True)
class Question:
    """What one of the two worker processes is asked to do."""

    label: str  # base or tuned
    model: str
    adapter: Path | None
    merge: bool
    trust_remote_code: bool
    system_prompt: str
    rows: list[Row]
    batch_size: int
    max_new_tokens: int


@dataclass(frozen=True)
class Score:
    accuracy: float  # prefix right and a + b = x, share of all rows
    prefix_rate: float  # prefix right, share of all rows
    seconds: float  # generating all answers, loading excluded
    tokens_per_second: float  # generated, end tokens included
    peak_load_bytes: int  # GPU, or resident memory without one
    peak_inference_bytes: int  # beyond what is held once the model is loaded


def ask(question: Question) -> tuple[list[str], int, float, int, int]:
    """Answers, generated tokens, seconds, peak bytes of loading and of generating. Runs in its own process."""
    memory = PeakMemory()
    tokenizer = load_tokenizer(question.model, question.trust_remote_code)
    model = load_model(question.model, question.adapter, question.merge, question.trust_remote_code)
    peak_load = memory.peak()
    prompts = [render_prompt(user_text(row), question.system_prompt, tokenizer) for row in question.rows]
    memory.reset()
    held = memory.now()
    with tqdm(total=len(prompts), desc=question.label, unit="prompt", disable=not sys.stderr.isatty()) as bar:
        (answers, num_tokens), seconds = timed(
            lambda: generate(
                model, tokenizer, prompts, question.batch_size, question.max_new_tokens, progress=bar.update
            )
        )
    return answers, num_tokens, seconds, peak_load, memory.peak() - held


def evaluate(question: Question) -> tuple[Score, list[tuple[Row, str, Verdict]]]:
    """Asks in a fresh process, so that neither model's memory counts for the other, and judges the answers."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers, num_tokens, seconds, peak_load, peak_inference = pool.submit(ask, question).result()
    judged = [
        (row, answer, check_answer(number_asked(row.instruction), answer))
        for row, answer in zip(question.rows, answers, strict=True)
    ]
    score = Score(
        accuracy=sum(verdict.right for _, _, verdict in judged) / len(judged),
        prefix_rate=sum(verdict.prefix for _, _, verdict in judged) / len(judged),
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        peak_load_bytes=peak_load,
        peak_inference_bytes=peak_inference,
    )
    return score, judged


def table(scores: dict[str, Score], num_rows: int, batch_size: int) -> str:
    """Ours beside the reference's, as a Markdown table."""
    columns: list[dict[str, Any]] = [*PUBLISHED_ANSWERS.values(), *(asdict(score) for score in scores.values())]
    rows = [
        ("prompts, batch size", ["20, 1"] * len(PUBLISHED_ANSWERS) + [f"{num_rows}, {batch_size}"] * len(scores)),
        ("accuracy", [f"{c['accuracy']:.3f}" for c in columns]),
        ("prefix right", [f"{c['prefix_rate']:.3f}" if "prefix_rate" in c else "–" for c in columns]),
        ("seconds", [f"{c['seconds']:.2f}" for c in columns]),
        ("tokens a second", [f"{c['tokens_per_second']:.1f}" for c in columns]),
        ("peak memory, loading, MB", [f"{c['peak_load_bytes'] / 1e6:,.1f}" for c in columns]),
        ("peak memory, inference beyond that, MB", [f"{c['peak_inference_bytes'] / 1e6:,.1f}" for c in columns]),
    ]
    names = [f"reference, {label}" for label in PUBLISHED_ANSWERS] + [f"ours, {label}" for label in scores]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="run folder of a training: asks its base and its fine-tuned model")
    which.add_argument("--config", type=Path, help="a recipe: asks its base model only and writes nothing")
    parser.add_argument("--adapter-only", action="store_true", help="with --run: ask the fine-tuned model alone")
    parser.add_argument("--data", default=str(ROOT / "data/math/math_eval_200.json"), help="rows to ask")
    parser.add_argument("--limit", type=int, help="ask only the first so many rows")
    parser.add_argument("--batch-size", type=int, default=50, help="prompts generated at once (default 50)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens after which an answer is cut off")
    parser.add_argument("--no-merge", action="store_true", help="keep the adapter beside the weights")
    args = parser.parse_args(argv)
    if args.adapter_only and not args.run:
        raise UserError("--adapter-only goes with --run, the folder of a training: a recipe alone has no adapter.")
    for name in ("limit", "batch_size", "max_new_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but has to be at least 1.")
    return args


def questions(args: argparse.Namespace) -> list[Question]:
    """One for each model to ask; UserError when the run, the recipe, the model or the rows are not there."""
    if args.run:
        for file in ("recipe.yaml", "adapter/adapter_config.json", f"adapter/{ADAPTER}"):
            if not (args.run / file).is_file():
                raise UserError(f"--run {args.run}: no {file} in there. Give the folder of a finished training.")
    recipe = parse_recipe(["--config", str(args.run / "recipe.yaml" if args.run else args.config)])[1]
    path = find_path(args.data)
    rows = read_rows(path)[: args.limit]
    fail_on_bad_rows(
        path, [f"row {row.number}: {problem}" for row in rows if (problem := _not_a_question(row))], len(rows)
    )
    adapters: dict[str, Path | None] = {} if args.adapter_only else {"base": None}
    model = find_model(recipe.model.name_or_path)
    adapted = check_model(recipe, build_tokenizer(recipe))  # fails here rather than in a worker
    if args.run:
        adapters["tuned"] = args.run / "adapter"
        _check_adapter(args.run / "adapter" / ADAPTER, adapted)
    return [
        Question(
            label=label,
            model=model,
            adapter=adapter,
            merge=not args.no_merge,
            trust_remote_code=recipe.model.trust_remote_code,
            system_prompt=recipe.data.system_prompt,
            rows=rows,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )
        for label, adapter in adapters.items()
    ]


def _check_adapter(file: Path, model: PeftModel) -> None:
    """PEFT only warns of an adapter that is not this model's, which then answers as the base does."""
    try:
        found = {name: tensor.shape for name, tensor in load_file(file).items()}
    except Exception as error:  # safetensors has an exception of its own
        raise UserError(f"{file}: cannot be read: {error}. Copy it anew, or train once more.") from error
    expected = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    if other := first_difference(found, expected):
        raise UserError(f"{file}: is not of the model and the recipe of this run, first in {other}. Train once more.")


def _not_a_question(row: Row) -> str | None:
    try:
        number_asked(row.instruction)
    except UserError as error:
        return str(error)
    return None


@exit_codes()
def main(argv: list[str]) -> None:
    args = parse(argv)
    to_ask = questions(args)
    scores: dict[str, Score] = {}
    lines = []
    for question in to_ask:
        print(f"asking the {question.label} model {len(question.rows)} questions …", flush=True)
        scores[question.label], judged = evaluate(question)
        for number, (row, answer, verdict) in enumerate(judged):
            line = {"model": question.label, "instruction": row.instruction, "answer": answer, **asdict(verdict)}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            if number < SAMPLES:
                print(f"  {row.instruction}  {answer!r}  {verdict.reason or 'right'}")
    print(f"\n{table(scores, len(to_ask[0].rows), args.batch_size)}")
    if args.run:
        (args.run / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        write_json(args.run / "eval.json", {label: asdict(score) for label, score in scores.items()})
        print(f"\nevery answer: {args.run / 'answers.jsonl'}\nrun folder: {args.run}")


if __name__ == "__main__":
    main(sys.argv[1:])
