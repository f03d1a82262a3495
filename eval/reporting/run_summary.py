"""Computes figures from the folders of runs. A figure that is None, or missing, was not measured."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.reporting.evaluation import Evaluation, read_evaluation
from eval.reporting.run_files import Columns, number, read_columns, read_jsonl, read_metrics, read_object, reading
from loop.measure.phase_names import PHASES, STEP_PHASES

GPU_IN_USE = 50e6  # bytes; a GPU whose memory grows by more is in use, because a CUDA context alone takes more
BUSY = 50.0  # per cent of utilisation; a GPU below this mostly waits

Figure = float | dict[str, float | None] | None


@dataclass(frozen=True, eq=False)
class Run:
    """Holds all that the files of one run say. A dictionary or list is empty when its file does not exist."""

    name: str
    result: dict[str, Any]  # result.json
    usage: dict[str, Any]  # usage.json
    memory_of: str  # the kind of memory that the peaks of the ranks count
    stage: int | None  # ZeRO stage
    offloaded: list[str]
    recipe: dict[str, Any]
    versions: dict[str, Any]
    evaluation: Evaluation  # eval.json
    answers: list[dict[str, Any]]
    metrics: list[dict[str, float | None]]
    samples: Columns
    figures: dict[str, Figure]
    tallies: dict[str, dict[str, float]] = field(default_factory=dict)  # of the rows of each file, from inputs.json

    def figure(self, key: str) -> float | None:
        """Returns a figure as one number: the largest, when the figure has several."""
        value = self.figures.get(key)
        return largest(value.values()) if isinstance(value, dict) else value


def measured(values: Iterable[float | None]) -> list[float]:
    """Returns the values that are not None."""
    return [value for value in values if value is not None]


def largest(values: Iterable[float | None]) -> float | None:
    return max(measured(values), default=None)


def mean(values: Iterable[float | None]) -> float | None:
    there = measured(values)
    return sum(there) / len(there) if there else None


def derived_columns(columns: Columns, cores: int | None) -> Columns:
    """Returns columns that follow from the columns of samples.csv.

    They show all GPUs in use as one GPU, and the CPU use of the processes in per cent of all cores.
    """
    gpus = sorted({found[1] for name in columns if (found := re.match(r"(gpu\d+)_", name))})
    memory = {gpu: measured(columns[f"{gpu}_memory_bytes"]) for gpu in gpus}
    in_use = [gpu for gpu in gpus if memory[gpu] and max(memory[gpu]) - memory[gpu][0] > GPU_IN_USE] or gpus
    combine: dict[str, Callable[[Iterable[float | None]], float | None]] = {
        "utilisation_percent": mean,
        "memory_bytes": largest,
    }
    derived = {
        f"gpu_{what}": [combined(row) for row in zip(*(columns[f"{gpu}_{what}"] for gpu in in_use), strict=True)]
        for what, combined in combine.items()
        if in_use
    }
    if cores:
        percents = columns.get("tree_cpu_percent", [])
        derived["cpu_percent"] = [None if percent is None else percent / cores for percent in percents]
    return derived


def sample_figures(columns: Columns) -> dict[str, Figure]:
    """Returns means and maxima over the whole training, including the time in which it loads."""

    def each(pattern: str, name: str) -> Figure:
        found = {int(match[1]): key for key in columns if (match := re.fullmatch(pattern, key))}
        return {f"{name} {place}": largest(columns[found[place]]) for place in sorted(found)} or None

    figures: dict[str, Figure] = {
        key: mean(columns.get(key, [])) for key in ("machine_cpu_percent", "cpu_percent", "gpu_utilisation_percent")
    }
    figures |= {
        key: largest(columns.get(key, [])) for key in ("tree_rss_bytes", "tree_shared_bytes", "tree_swap_bytes")
    }
    used = measured(columns.get("machine_used_bytes", []))
    busy = measured(columns.get("gpu_utilisation_percent", []))
    at_work = [place for place, percent in enumerate(busy) if percent > 0]
    return figures | {
        "machine_used_bytes": max(used) - used[0] if used else None,
        "rank_rss_bytes": each(r"rank(\d+)_rss_bytes", "rank"),
        "gpu_memory_bytes": each(r"gpu(\d+)_memory_bytes", "GPU"),
        "gpu_busy_percent": mean(100.0 * (busy[place] >= BUSY) for place in range(at_work[0], at_work[-1] + 1))
        if at_work
        else None,
    }


def usage_figures(usage: Mapping[str, Any], peaks: Mapping[str, Any]) -> dict[str, Figure]:
    """Returns the figures that follow from usage.json.

    `peaks` is comparison.json, which has the FLOP/s of a matrix product, or an empty dictionary.
    """
    steps, ranks = [number(seconds) for seconds in usage["step_seconds"]], usage["ranks"]
    phases = [rank["phases"] for rank in ranks]
    figures: dict[str, Figure] = {
        "wall_seconds": number(usage["wall_seconds"]),
        "peak_bytes": {
            f"rank {rank['rank']}": largest(cost["peak_bytes"] for cost in rank["phases"].values()) for rank in ranks
        },
        "phase_peak_bytes": {
            phase: largest(costs[phase]["peak_bytes"] for costs in phases if phase in costs)
            for phase in PHASES
            if any(phase in costs for costs in phases)
        },
    }
    if steps and usage["engine"] != "PyTorch DDP":  # the collectives of PyTorch DDP are not counted
        traffic = [_collective_bytes(costs, len(steps)) for costs in phases]
        figures["communication_bytes"] = max(sum(of_rank.values()) for of_rank in traffic)
        figures["collective_bytes"] = {
            kind: max(of_rank.get(kind, 0.0) for of_rank in traffic) for kind in sorted({k for t in traffic for k in t})
        }
    if steady := steps[max(3, math.ceil(len(steps) / 10)) :]:
        lower, median, upper = (float(value) for value in np.percentile(steady, (25, 50, 75)))
        a_second = 1 / len(steps) / median
        key = "matmul_peak_flops" + ("_fp32" if usage["precision"] == "no" else "")
        peak = peaks.get(key, {}).get(usage["device_type"])
        devices = len(ranks) if usage["device_type"] == "cuda" else 1  # the peak of the CPU counts all its cores
        figures |= {
            "steady_steps": len(steady),
            "step_seconds": median,
            "step_quartiles": {"lower quartile": lower, "upper quartile": upper},
            # This is half of a notch. Medians differ when their notches do not overlap (McGill, Tukey, Larsen 1978).
            "step_uncertainty": 1.57 * (upper - lower) / math.sqrt(len(steady)) / median,
            "samples_per_second": number(usage["rows"]) * a_second,
            "tokens_per_second": number(usage["tokens"]) * a_second,
            "flops_per_second": number(usage["model_flops"]) * a_second,
            "mfu": number(usage["model_flops"]) * a_second / number(peak) / devices if peak else None,
        }
    return figures


def with_second_round(figures: dict[str, Figure], again: Mapping[str, Figure]) -> dict[str, Figure]:
    """Returns the figures with the step time of both rounds: the mean of the two medians.

    The uncertainty also has half the distance between the medians: what the machine itself changed between the rounds.
    """
    one, other = figures.get("step_seconds"), again.get("step_seconds")
    if not isinstance(one, float) or not isinstance(other, float):
        return figures
    both, steady, spread = (one + other) / 2, figures["steady_steps"], figures["step_uncertainty"]
    assert isinstance(steady, int | float)
    assert isinstance(spread, float)
    faster = {
        key: value * one / both
        for key in ("samples_per_second", "tokens_per_second", "flops_per_second", "mfu")
        if isinstance(value := figures.get(key), float)
    }
    return {
        **figures,
        **faster,
        "step_seconds": both,
        "step_rounds": {"first round": one, "second round": other},
        "step_uncertainty": spread + abs(one - other) / 2 / both,
    }


def _collective_bytes(phases: Mapping[str, Any], num_steps: int) -> dict[str, float]:
    """Returns the bytes of one rank in one step, by the kind of collective."""
    traffic: dict[str, float] = {}
    for phase in STEP_PHASES:
        for kind, cost in phases.get(phase, {}).get("collectives", {}).items():
            traffic[kind] = traffic.get(kind, 0.0) + number(cost["bytes"]) / num_steps
    return traffic


def _zero(file: Path) -> tuple[int | None, list[str]]:
    """Returns the ZeRO stage and what is offloaded, for example ["optimizer to cpu"]."""
    zero = read_object(file).get("zero_optimization", {})
    with reading(file):
        stage = int(number(zero["stage"])) if zero else None
        devices = {part: (zero.get(f"offload_{part}") or {}).get("device") for part in ("optimizer", "param")}
        return stage, [f"{part} to {device}" for part, device in devices.items() if device not in (None, "none")]


def _tallies(file: Path) -> dict[str, dict[str, float]]:
    """Returns what became of the rows of each file; an older inputs.json does not say it."""
    files = read_object(file).get("files", {})
    with reading(file):
        return {name: {key: number(count) for key, count in tally.items()} for name, tally in files.items()}


def read_run(name: str, folder: Path, comparison: Mapping[str, Any] | None = None) -> Run:
    """Reads a run folder or, when `comparison` gives the content of comparison.json, the folder of a configuration.

    A training that has not finished gets no figures, because they would describe half a run, but it gets its curves.
    Raises UserError for damaged files.
    """
    run = folder if comparison is None else folder / "run"
    usage, answers = read_object(run / "usage.json"), read_jsonl(run / "answers.jsonl")
    metrics = read_metrics(run / "metrics.jsonl")
    stage, offloaded = _zero(run / "deepspeed_config.json")
    result: dict[str, Any] = {}
    samples: Columns = {}
    figures: dict[str, Figure] = {}
    with reading(run / "usage.json"):
        figures |= usage_figures(usage, comparison or {}) if usage else {}
    if comparison is not None:
        cores = comparison["machine"]["cores"]
        result = read_object(folder / "result.json")
        with reading(folder / "samples.csv"):
            samples = read_columns(folder / "samples.csv")
            samples |= derived_columns(samples, cores)
            figures |= sample_figures(samples) if usage else {}
        with reading(folder / "result.json"):
            again = read_object(folder / "again" / "usage.json")
            if again and usage:
                figures = with_second_round(figures, usage_figures(again, comparison))
            if result and usage:
                figures["wall_seconds"] = number(result["wall_seconds"])
                figures["sampling_share"] = number(result["sampling"]["share_of_a_core"])
    with reading(run / "eval.json"):
        evaluation = read_evaluation(read_object(run / "eval.json"), answers)
        figures |= {f"{label}_accuracy": score.get("accuracy") for label, score in evaluation.scores.items()}
    for key, figure in (("train/loss", "final_loss"), ("val/loss", "final_validation_loss")):
        figures[figure] = next((line[key] for line in reversed(metrics) if line.get(key) is not None), None)
    return Run(
        name=name,
        result=result,
        usage=usage,
        memory_of=str(usage.get("memory_of", "")),
        stage=stage,
        offloaded=offloaded,
        recipe=read_object(run / "recipe.yaml"),
        versions=read_object(run / "versions.json"),
        evaluation=evaluation,
        answers=answers,
        metrics=metrics,
        samples=samples,
        figures=figures,
        tallies=_tallies(run / "inputs.json"),
    )
