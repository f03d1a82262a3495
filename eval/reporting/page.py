"""Composes pages of tables, charts and sentences. The page about a comparison is here, that of runs in run_page.py."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.nested import without_nesting
from eval.reference import PUBLISHED, PUBLISHED_ANSWERS, STAGE1, STAGES
from eval.reporting.answers import Answers
from eval.reporting.charts import Chart, loss_charts, sample_chart
from eval.reporting.conclusions import NOT_MEASURED, RULES, conclusions, sentences
from eval.reporting.first_screen import Card
from eval.reporting.run_summary import Run

ABSENT = "–"  # stands where there was nothing to measure
# Each row has a title with the unit, the name of the figure, the divisor of its values, and the number of decimals.
ROWS = (
    ("wall time, s", "wall_seconds", 1, 1),
    ("steady step time, s: median", "step_seconds", 1, 4),
    ("steady step time, s", "step_quartiles", 1, 4),
    ("steady step time, s", "step_rounds", 1, 4),
    ("steady steps", "steady_steps", 1, 0),
    ("samples a second", "samples_per_second", 1, 1),
    ("tokens a second", "tokens_per_second", 1, 1),
    ("model FLOP/s, 10^9", "flops_per_second", 1e9, 3),
    ("model FLOPs utilisation, %", "mfu", 0.01, 2),
    ("CPU use of the machine, mean %", "machine_cpu_percent", 1, 1),
    ("CPU use by the run's processes, mean % of all cores", "cpu_percent", 1, 1),
    ("GPU utilisation, mean %", "gpu_utilisation_percent", 1, 1),
    ("CPU use by the sampling itself, % of a core", "sampling_share", 0.01, 2),
    ("peak memory of a rank, MB", "peak_bytes", 1e6, 1),
    ("peak memory of a rank by phase, MB", "phase_peak_bytes", 1e6, 1),
    ("resident host memory of all processes, peak MB", "tree_rss_bytes", 1e6, 1),
    ("resident host memory, peak MB", "rank_rss_bytes", 1e6, 1),
    ("shared memory of all processes, peak MB", "tree_shared_bytes", 1e6, 1),
    ("swap of all processes, peak MB", "tree_swap_bytes", 1e6, 1),
    ("host memory of the machine beyond the launch, peak MB", "machine_used_bytes", 1e6, 1),
    ("GPU memory, peak MB", "gpu_memory_bytes", 1e6, 1),
    ("communication a step and rank, MB", "communication_bytes", 1e6, 3),
    ("communication a step and rank by kind, MB", "collective_bytes", 1e6, 3),
    ("training loss at the end, nats a label token", "final_loss", 1, 4),
    ("validation loss at the end, nats a label token", "final_validation_loss", 1, 4),
    ("accuracy after training", "tuned_accuracy", 1, 3),
)
SCORE_ROWS = (
    ("accuracy", "accuracy", 1, 3),
    ("prefix right", "prefix_rate", 1, 3),
    ("seconds", "seconds", 1, 2),
    ("tokens a second", "tokens_per_second", 1, 1),
    ("peak memory, loading, MB", "peak_load_bytes", 1e6, 1),
    ("peak memory, inference beyond that, MB", "peak_inference_bytes", 1e6, 1),
)
HOW = (
    "Steps are steady after the first 10 %, at least 3. Quartiles are of rank 0's steps: data, forward, backward and "
    "update. FLOPs are forward's and backward's of real tokens, without recomputation; the peak is a matrix product's "
    "on the same machine. MB are 10^6 bytes. Communication is that of the rank with most, each collective counted by "
    "its whole tensor. A dash stands for what a run does not have."
)
AVERAGED = "A line of more than 100 points is drawn as means over hundredths of the x axis; the CSV has all points."


@dataclass(frozen=True)
class Table:
    """Holds a table of texts."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    folded: bool = False  # the page shows only the caption until the reader unfolds the table
    words: bool = False  # the cells hold words, so the page aligns them to the left and wraps them


@dataclass(frozen=True)
class AnswersBlock:
    """Holds all answers for the page, and the tables of those that failed for report.md."""

    answers: Answers
    failed: Sequence[str | Table]


Block = str | Table | Chart | Card | AnswersBlock


@dataclass(frozen=True)
class Page:
    """Holds a page; its sections have titles and blocks. A section without blocks is not shown."""

    title: str
    about: str
    sections: dict[str, Sequence[Block]]


def cell(value: float | None, divisor: float = 1, decimals: int = 1) -> str:
    """Returns a number as it stands in a table."""
    if value is None:
        return NOT_MEASURED
    value /= divisor
    text = f"{value:,.{min(decimals, 1) if abs(value) >= 1000 else decimals}f}"
    return text if value == 0 or text.strip("-0.") else f"{value:.1e}"  # a small number must not read as 0


def figure_rows(runs: Sequence[Run], leave_out: Container[str] = ()) -> list[list[str]]:
    """Returns a row for each figure, or for each part of a figure that has parts."""
    rows = [
        ["state", *map(state, runs)],
        ["peak memory of a rank is its", *(run.memory_of or NOT_MEASURED for run in runs)],
    ]
    for title, key, divisor, decimals in ROWS:
        figures = [run.figures.get(key) for run in runs]
        parts = dict.fromkeys(part for figure in figures if isinstance(figure, dict) for part in figure)
        for part in parts or [""] * (key not in leave_out):
            cells = [
                ABSENT
                if isinstance(figure, dict) and part not in figure
                else cell(figure.get(part) if isinstance(figure, dict) else figure, divisor, decimals)
                for figure in figures
            ]
            rows.append([f"{title}: {part}" if part else title, *cells])
    return rows


def state(run: Run) -> str:
    """Says whether a run has finished, and why not."""
    said = [str(run.result[key]) for key in ("status", "reason") if run.result.get(key)]
    return ": ".join(said) or ("finished" if run.usage else "not known to have ended")


def effective_batch(run: Run) -> str:
    """Returns the three factors of the effective batch, for example "2 x 16 x 1"."""
    keys = ("num_processes", "micro_batch_size", "grad_accum_steps")
    return " x ".join(str(run.result[key]) for key in keys if key in run.result) or ABSENT


def published_table(runs: Sequence[Run]) -> Table:
    """Returns the table of the reference beside ours. Its four configurations come first, then our other ones."""
    named = {run.name: run for run in runs}
    of_stage1 = named[STAGE1].figure("wall_seconds") if STAGE1 in named else None
    rows = []
    for name in dict.fromkeys([*STAGES, *named]):
        published, run = PUBLISHED.get(name), named.get(name)
        wall = run.figure("wall_seconds") if run else None
        ranks = run.figures.get("rank_rss_bytes") if run else None
        memory = [cell(value, 1e6, 0) for value in ranks.values()] if isinstance(ranks, dict) else []
        theirs = [ABSENT] * 4
        if published:
            times = published.wall_seconds / PUBLISHED[STAGE1].wall_seconds
            process_mb = " / ".join(map(str, published.process_mb))
            theirs = [cell(published.wall_seconds, 1, 0), cell(times, 1, 2), str(published.cpu_percent), process_mb]
        ours = [
            cell(wall),
            cell(wall / of_stage1 if wall and of_stage1 else None, 1, 2),
            cell(run.figure("cpu_percent") if run else None),
            " / ".join(memory) or NOT_MEASURED,
        ]
        rows.append([name, *(value for pair in zip(theirs, ours, strict=True) for value in pair)])
    heads = ("wall time, s", "times stage 1", "mean CPU utilisation, %", "process memory, MB")
    caption = "The reference's table: Qwen2.5-14B on two 32 GB GPUs, beside this recipe on this machine"
    return Table(caption, ["", *(f"{head}: {whose}" for head in heads for whose in ("published", "ours"))], rows)


def answers_table(runs: Sequence[Run]) -> Table:
    """Returns the table of scores before and after training, of the reference and of our runs."""
    columns = {f"published, {label}": score for label, score in PUBLISHED_ANSWERS.items()}
    columns |= {f"{run.name}, {label}": score for run in runs for label, score in run.evaluation.scores.items()}
    rows = [
        [title, *(cell(score[key], divisor, decimals) if key in score else ABSENT for score in columns.values())]
        for title, key, divisor, decimals in SCORE_ROWS
    ]
    return Table("Before and after training", ["", *columns], rows)


def setting(value: Any) -> str:
    """Returns the value of one setting as text."""
    shown = value if isinstance(value, list) else [value]
    return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in shown) or "none"


def settings_table(caption: str, columns: Mapping[str, Any], folded: bool = False) -> Table:
    """Returns a table with a column for each value of `columns`, and a row for each setting in them."""
    flat = {name: without_nesting(values, open_lists=True) for name, values in columns.items() if values}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = [[key, *(setting(values[key]) if key in values else ABSENT for values in flat.values())] for key in keys]
    return Table(caption, ["", *flat], rows, folded, words=True)


def conclusions_table(judged: Sequence[Mapping[str, str]]) -> Table:
    return Table("The reference's conclusions", list(judged[0]), [list(each.values()) for each in judged], words=True)


def comparison_page(comparison: Mapping[str, Any], runs: Sequence[Run]) -> Page:
    """Composes the page of a comparison; `comparison` is the content of comparison.json."""
    recipe = " ".join(map(str, [comparison["recipe"], *comparison["overrides"]]))
    names = [run.name for run in runs]
    batch = ["processes x rows x accumulated", *map(effective_batch, runs)]
    shared = next((run.recipe for run in runs if run.recipe), {})
    machine = comparison["machine"] | {
        "seconds between samples": comparison["interval"],
        "matrix product in bf16, FLOP/s": comparison["matmul_peak_flops"] or NOT_MEASURED,
        "matrix product in fp32, FLOP/s": comparison.get("matmul_peak_flops_fp32") or NOT_MEASURED,
    }
    of_gpus, of_cores = "% (mean of the GPUs in use)", "% of all cores"
    return Page(
        f"{len(runs)} configurations of {comparison['recipe']}",
        f"Recipe {recipe}, {comparison['date']}.",
        {
            "Findings": [*sentences(runs), conclusions_table(conclusions(runs)), RULES],
            "The reference and this machine": [published_table(runs), answers_table(runs)],
            "Each configuration": [HOW, Table("Figures", ["", *names], [batch, *figure_rows(runs)])],
            "Over time": [
                AVERAGED,
                sample_chart("gpu_utilisation", "GPU utilisation", of_gpus, "gpu_utilisation_percent", runs),
                sample_chart("gpu_memory", "GPU memory, of the fullest GPU", "used, ", "gpu_memory_bytes", runs),
                sample_chart("cpu_utilisation", "CPU utilisation by the run", of_cores, "cpu_percent", runs),
                sample_chart("host_memory", "Host memory of all processes", "resident, ", "tree_rss_bytes", runs),
            ],
            "Loss": loss_charts(runs),
            "Machine and versions": [
                settings_table("Machine", {"this machine": machine}),
                settings_table("Versions", {"version": comparison["versions"]}),
                settings_table("Recipe", {f"that of {comparison['recipe']}": shared}, folded=True),
            ],
        },
    )  # fmt: skip
