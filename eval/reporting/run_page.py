"""Composes the page about one run or about several runs that belong to no comparison.

Its first screen answers the reader's questions. Curves and answers follow, and the tables of figures are at the end.
"""

from collections.abc import Sequence
from typing import Any

from eval.nested import without_nesting
from eval.reporting.answers import collect_answers
from eval.reporting.charts import accuracy_chart, loss_chart, metric_chart, phase_chart
from eval.reporting.conclusions import NOT_MEASURED, sentences
from eval.reporting.first_screen import cards, duration, how_to_ask, interval_text, percent, signed
from eval.reporting.page import (
    ABSENT,
    HOW,
    AnswersBlock,
    Block,
    Page,
    Table,
    cell,
    figure_rows,
    setting,
    settings_table,
)
from eval.reporting.run_summary import Run, sample_figures
from eval.reporting.warning_signs import points, warning_signs

MOST_FAILED_ANSWERS = 200  # number of failed answers of one model that report.md shows
USED = ("engine", "precision", "memory_of", "parameters", "trainable", "first_step", "last_step", "rows", "tokens")
ENGINE = ("engine", "precision", "device_type")  # compared besides the recipes, without the sizes of buckets


def run_page(runs: Sequence[Run]) -> Page:
    """Composes the page of one or more runs that belong to no comparison."""
    signs = {run.name: warning_signs(run) for run in runs}
    names = [run.name for run in runs]
    return Page(
        f"Run {names[0]}" if len(runs) == 1 else f"{len(runs)} runs",
        about(runs[0]) if len(runs) == 1 else ", ".join(names),
        {
            "Summary": list(cards(runs[0], signs[names[0]])) if len(runs) == 1 else [],
            "What differs": differences(runs) if len(runs) > 1 else [],
            "Side by side": side_by_side(runs, signs) if len(runs) > 1 else [],
            "Training": [
                loss_chart(runs),
                *([accuracy] if (accuracy := accuracy_chart(runs)) else []),
                metric_chart("train/lr", "Learning rate", "learning rate", runs, interactive=True),
                metric_chart("train/grad_norm", "Gradient norm before clipping", "norm", runs, interactive=True),
                metric_chart(
                    "train/tokens_per_second", "Throughput", "tokens a second, without padding", runs, interactive=True
                ),
            ],
            "Answers": answers_section(runs),
            "Figures": [
                HOW,
                Table(
                    "Figures",
                    ["", *names],
                    figure_rows(runs, leave_out={*sample_figures({}), "sampling_share"}),
                    folded=True,
                ),
                phase_chart(runs),
            ],
            "Machine, versions, recipe": [
                settings_table("Machine", {run.name: used(run) for run in runs}, folded=True),
                settings_table("Versions", {run.name: run.versions for run in runs}, folded=True),
                settings_table("Recipe", {run.name: run.recipe for run in runs}, folded=True),
            ],
        },
    )


def about(run: Run) -> str:
    """Says in a line which model was trained on what."""
    recipe = without_nesting(run.recipe)
    said = {"model.name_or_path": "", "epochs": "epochs ", "optim.lr": "lr ", "lora.rank": "LoRA rank "}
    parts = [f"{text}{setting(recipe[key])}" for key, text in said.items() if key in recipe]
    if "engine" in run.usage:
        parts.append(str(run.usage["engine"]).split(",")[0])  # without the sizes of its buckets
    return ", ".join(parts)


def used(run: Run) -> dict[str, Any]:
    """Returns what the run used of its machine."""
    devices = {f"rank {rank['rank']}": rank.get("device") for rank in run.usage.get("ranks", [])}
    return {key: run.usage[key] for key in USED if key in run.usage} | devices


def differences(runs: Sequence[Run]) -> list[Block]:
    """Returns a table of the settings in which the runs differ, and only of those."""
    columns = [
        without_nesting(run.recipe, open_lists=True)
        | {key: str(run.usage[key]).split(",")[0] for key in ENGINE if key in run.usage}
        | ({"processes": len(run.usage["ranks"])} if "ranks" in run.usage else {})
        for run in runs
    ]
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [setting(column[key]) if key in column else ABSENT for column in columns]
        rows += [[key, *cells]] if len(set(cells)) > 1 else []
    if not rows:
        return ["The recipes of these runs have the same values."]
    return [Table("Settings in which the runs differ", ["", *(run.name for run in runs)], rows, words=True)]


def side_by_side(runs: Sequence[Run], signs: dict[str, list[str]]) -> list[Block]:
    """Returns the results and costs of the runs in one table, then what is wrong with each, and the findings."""

    def accuracy(run: Run, label: str) -> str:
        value, interval = run.figure(f"{label}_accuracy"), run.evaluation.intervals.get(label)
        if value is None:
            return NOT_MEASURED
        return f"{percent(value)} ({interval_text(interval)})" if interval else percent(value)

    def gain(run: Run) -> str:
        found = run.evaluation.first_judge
        if found is None or found.difference is None:
            return NOT_MEASURED
        return f"{signed(found.difference)} points, {found.better:,} better, {found.worse:,} worse"

    def wall_time(run: Run) -> str:
        seconds = run.figure("wall_seconds")
        return NOT_MEASURED if seconds is None else duration(seconds)

    losses = [[loss for _, loss in points(run.metrics, "val/loss")] for run in runs]
    rows = [
        ["accuracy before (95 % interval)", *(accuracy(run, "base") for run in runs)],
        ["accuracy after (95 % interval)", *(accuracy(run, "tuned") for run in runs)],
        ["difference", *map(gain, runs)],
        ["val/loss, lowest", *(cell(min(each, default=None), 1, 4) for each in losses)],
        ["val/loss, last", *(cell(each[-1] if each else None, 1, 4) for each in losses)],
        ["time", *map(wall_time, runs)],
        ["peak memory, MB", *(cell(run.figure("peak_bytes"), 1e6, 0) for run in runs)],
        ["tokens per second", *(cell(run.figure("tokens_per_second"), 1, 0) for run in runs)],
        ["warnings", *(str(len(signs[run.name])) if signs[run.name] else "none" for run in runs)],
    ]
    table = Table("Results and costs", ["", *(run.name for run in runs)], rows)
    return [table, *(f"{name}: {sign}" for name, found in signs.items() for sign in found), *sentences(runs)]


def answers_section(runs: Sequence[Run]) -> list[Block]:
    """Returns the block of all answers, or says how to get answers."""
    asked = [run for run in runs if run.answers]
    unasked: list[Block] = [f"{run.name}: {NOT_MEASURED}. {how_to_ask(run)}" for run in runs if not run.answers]
    if not asked:
        return unasked
    failed = [block for run in asked for block in failed_answers(run)]
    return [AnswersBlock(collect_answers(asked), failed), *unasked]


def failed_answers(run: Run) -> list[str | Table]:
    """Returns the answers that failed: a table for each model that the evaluation asked."""
    blocks: list[str | Table] = []
    for model in dict.fromkeys(answer.get("model") for answer in run.answers):
        asked = [answer for answer in run.answers if answer.get("model") == model]
        failed = [answer for answer in asked if answer.get("right") is not None and not answer["right"]]
        caption = f"{run.name}, {model}: {len(failed)} of {len(asked)} answers failed"
        caption += f", the first {MOST_FAILED_ANSWERS} of which are these" if len(failed) > MOST_FAILED_ANSWERS else ""
        rows = [
            [str(answer.get(key)) for key in ("instruction", "answer", "reason")]
            for answer in failed[:MOST_FAILED_ANSWERS]
        ]
        blocks.append(
            Table(caption, ["asked", "answer", "what is wrong"], rows, folded=True) if rows else f"{caption}."
        )
    return blocks
