"""Asks the base model and the fine-tuned model and judges their answers: `python -m eval.run --run runs/…`.

This command prints a table of accuracies and costs, and says whether the two models differ. It writes eval.json and
answers.jsonl into the run folder and draws the run's report.html again.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from data.errors import UserError
from eval.answers.ask import Question, ask_everywhere
from eval.answers.vllm_backend import check_vllm
from eval.judging.judges import JUDGES, Judge
from eval.judging.scores import (
    Comparison,
    Judged,
    Score,
    answer_lines,
    compare_models,
    judge_all,
    score_of,
    scores_as_json,
)
from eval.judging.table import table
from eval.options import add_common_options, check_common_options, check_rules
from eval.questions import BASE, TUNED, Examination, examination
from loop.guard.process import end_process, exit_codes
from loop.saving.adapter import Choice, publish_adapter
from loop.saving.checkpoint import step_of
from loop.saving.run_folder import write_json

SHOWN_ANSWERS = 3  # answers of each model that are printed


@dataclass(frozen=True)
class Results:
    """Holds what an evaluation has found, by the labels of the models."""

    asked: Mapping[str, Any]  # what was asked, and how
    judged: dict[str, list[Judged]]
    scores: dict[str, Score]
    comparisons: dict[str, Comparison]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options of this command. Raises UserError for values that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__)
    add_common_options(parser)
    parser.add_argument("--adapter-only", action="store_true", help="with --run: ask the fine-tuned model alone")
    parser.add_argument("--checkpoints", choices=("all",), help="with --run: ask each checkpoint of the run too")
    parser.add_argument("--data", help="rows to ask (default: the recipe's eval.data, or its validation file)")
    parser.add_argument(
        "--judge",
        nargs="+",
        metavar="NAME",
        help=f"the most important first: {', '.join(JUDGES)}, or FILE.py:FUNCTION (default: the recipe's eval.judge)",
    )
    parser.add_argument("--limit", type=int, help="ask only the first so many rows")
    parser.add_argument("--batch-size", type=int, help="answers generated at once (default: what fits into memory)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="tokens after which an answer is cut off (default: the recipe's, or twice the longest of the rows' own)",
    )
    parser.add_argument("--samples", type=int, default=1, help="answers to each question: pass@k and the majority's")
    parser.add_argument("--verify", type=int, default=0, help="ask the first so many again, one at a time, and compare")
    parser.add_argument("--backend", choices=("transformers", "vllm"), default="transformers", help="what generates")
    args = parser.parse_args(argv)
    if args.backend == "vllm":
        check_vllm(args.verify, args.no_merge)
    for option in ("adapter_only", "checkpoints"):
        if getattr(args, option) and not args.run:
            raise UserError(
                f"--{option.replace('_', '-')} goes with --run, the folder of a training: a recipe has no adapter."
            )
    check_common_options(args)
    check_rules(
        args,
        {
            "limit": (args.limit is None or args.limit >= 1, "at least 1"),
            "batch_size": (args.batch_size is None or args.batch_size >= 1, "at least 1"),
            "samples": (args.samples >= 1, "at least 1"),
            "verify": (args.verify >= 0, "at least 0"),
        },
    )
    if args.samples > 1 and not args.temperature:
        raise UserError("--samples needs --temperature above 0: without it all answers are alike.")
    return args


def evaluate(examined: Examination, main_process: bool) -> Results:
    """Asks all models, and judges their answers on the main process. Every rank has to call this function."""
    judged: dict[str, list[Judged]] = {}
    scores: dict[str, Score] = {}
    for question in examined.questions:
        if main_process:
            print(f"asking the {question.label} model {len(question.rows)} questions …", flush=True)
        asked = ask_everywhere(question)
        if main_process:
            judged[question.label] = judge_all(question.rows, asked, examined.judges)
            scores[question.label] = score_of(judged[question.label], asked, question.verify)
            if examined.judges:
                show_judged(judged[question.label])
    if main_process and examined.checkpoints:
        best = choose_best(examined, scores)
        judged[TUNED], scores[TUNED] = judged[best], scores[best]
    both = BASE in judged and TUNED in judged
    return Results(
        asked_as_json(examined.data, examined.questions[0], examined.judges),
        judged,
        scores,
        compare_models(judged[BASE], judged[TUNED]) if both else {},
    )


def choose_best(examined: Examination, scores: Mapping[str, Score]) -> str:
    """Makes adapter/ of the checkpoint that is best by the first judge, and returns its label.

    Among equally good ones it is the earliest.
    """
    accuracies = {step_of(folder): scores[folder.name].accuracy or 0.0 for folder in examined.checkpoints}
    best = max(examined.checkpoints, key=lambda folder: accuracies[step_of(folder)])
    choice = Choice(best, examined.judges[0].name, accuracies)
    publish_adapter(best.parent.parent, choice)
    print(f"adapter: {best.parent.parent / 'adapter'} (step {choice.step}, {choice.reason})", flush=True)
    return best.name


def asked_as_json(data: str, question: Question, judges: Sequence[Judge]) -> dict[str, Any]:
    """Returns what was asked, and how."""
    return {
        "data": data,
        "num_questions": len(question.rows),
        "judges": [judge.name for judge in judges],
        "backend": question.backend,
        "system_prompt": question.recipe.data.system_prompt,
        **asdict(question.settings),
    }


def show_judged(judged: Sequence[Judged]) -> None:
    """Prints the first few answers of a model with the first judge's verdict."""
    for row in judged[:SHOWN_ANSWERS]:
        verdict = next(iter(row.verdicts.values()))[0]
        print(f"  {row.row.question}  {row.answers[0].text!r}  {verdict.reason or 'right'}")


def show_side_by_side(judged: Mapping[str, Sequence[Judged]]) -> None:
    """Prints the first few questions with the answer of each model, where no judge says which is right."""
    for rows in list(zip(*judged.values(), strict=True))[:SHOWN_ANSWERS]:
        print(f"\n  {rows[0].row.question}")
        for label, row in zip(judged, rows, strict=True):
            print(f"    {label}: {row.answers[0].text!r}")


def show(results: Results, batch_size: int | None) -> None:
    """Prints the results."""
    if not results.asked["judges"]:
        show_side_by_side(results.judged)
    print(f"\n{table(results.scores, results.asked, batch_size)}")
    for judge, comparison in results.comparisons.items():
        print(comparison.sentence(judge))
    for label, score in results.scores.items():
        if score.verified:
            print(f"{label}: {score.different} of {score.verified} answers differ from those asked for one at a time")
        if score.cut_off:
            most = results.asked["max_new_tokens"]
            print(
                f"{label}: {score.cut_off} answers were cut off after {most} tokens; --max-new-tokens gives them more"
            )


def write_results(run_dir: Path, results: Results) -> None:
    """Writes the evaluation into the run folder and draws the run's report, which shows the evaluation."""
    lines = [line for label, judged in results.judged.items() for line in answer_lines(label, judged)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (run_dir / "answers.jsonl").write_text(text, encoding="utf-8", errors="replace")
    write_json(run_dir / "eval.json", scores_as_json(results.asked, results.scores, results.comparisons))
    print(f"\nevery answer: {run_dir / 'answers.jsonl'}\nrun folder: {run_dir}")
    try:
        # The import stands here because the workers import this file too: matplotlib would add to their peak memory.
        from eval.report import write_run_report

        summary = write_run_report([run_dir], run_dir)
    except Exception as error:  # the evaluation is written; a missing drawing does not make it fail
        print(f"warning: no report: {error}", flush=True)
    else:
        print("\n".join(summary))
        print(f"report: {run_dir / 'report.html'}")


@exit_codes()
def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    main_process = os.environ.get("RANK", "0") == "0"
    examined = examination(args)
    if main_process:
        for warning in examined.warnings:
            print(f"warning: {warning}", flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True)  # these processes exchange only text; their workers use the GPUs
    results = evaluate(examined, main_process)
    if not main_process:
        return
    show(results, args.batch_size)
    if args.run:
        write_results(args.run, results)


if __name__ == "__main__":
    end_process(main)
