"""Tests verdicts and sentences that follow from figures written down here."""

from typing import Any

import pytest

from eval.reference import PUBLISHED, STAGE0, STAGE1, STAGE2, STAGE3
from eval.reporting.conclusions import CLAIMS, Claim, Quantity, conclusions, judge, sentences
from eval.reporting.run_summary import Run
from tests.sample_runs import run

NOT_TESTABLE = "not testable on this machine"
TIE, SLOWER, CPU, GPU_MEMORY, GAPS, HOST_MEMORY, ACCURACY = CLAIMS


def stages(device: str = "cuda", **figures: tuple[Any, ...]) -> list[Run]:
    """Returns the four configurations of the reference; each figure is a tuple with one value for each of them."""
    names = (STAGE0, STAGE1, STAGE2, STAGE3)
    common: dict[str, Any] = {"steady_steps": 51, "step_uncertainty": 0.001}
    return [run(names[i], device, **common | {key: values[i] for key, values in figures.items()}) for i in range(4)]


@pytest.mark.parametrize(
    ("values", "uncertainty", "verdict"),
    [
        ([1.0, 1.2], 0.0, "confirmed"),
        ([1.0, 1.2], 0.05, "confirmed"),
        ([1.0, 1.2], 0.15, NOT_TESTABLE),  # 1.35 is outside, 1.05 is not
        ([1.0, 1.4], 0.15, NOT_TESTABLE),  # the other way round
        ([1.0, 1.4], 0.05, "contradicted"),
        ([1.0, 0.7], 0.05, "contradicted"),
        ([1.0, None], 0.0, NOT_TESTABLE),
        ([1.4, None], 0.0, "contradicted"),
    ],
)
def test_the_whole_uncertainty_has_to_be_within_or_outside(
    values: list[float | None], uncertainty: float, verdict: str
) -> None:
    quantities = [Quantity("q", value, uncertainty) for value in values]
    claim = Claim("c", "p", "w", low=0.8, high=1.3, quantities=lambda runs: quantities)
    assert judge(claim, []).verdict == verdict


def test_the_reference_confirms_itself() -> None:
    published = [PUBLISHED[name] for name in (STAGE0, STAGE1, STAGE2, STAGE3)]
    seconds: tuple[float, ...] = tuple(each.wall_seconds for each in published)
    percents: tuple[float, ...] = tuple(each.cpu_percent for each in published)
    assert list(seconds) == [114, 112, 114, 720]
    assert list(percents) == [7.6, 8.5, 9.0, 11.5]
    runs = stages(step_seconds=seconds, cpu_percent=percents)
    assert [judge(claim, runs).verdict for claim in (TIE, SLOWER, CPU)] == ["confirmed"] * 3


@pytest.mark.parametrize(
    ("claim", "figure", "values", "verdict"),
    [
        (TIE, "step_seconds", (1.0, 1.01, 1.02, 6.0), "confirmed"),
        (TIE, "step_seconds", (1.0, 1.0, 1.1, 6.0), "contradicted"),
        (TIE, "step_seconds", (1.0, 1.0, 1.0295, 6.0), NOT_TESTABLE),  # 1.0295 ± 0.0021 of at most 1.03
        (SLOWER, "step_seconds", (1.0, 1.0, 1.0, 5.5), "confirmed"),
        (SLOWER, "step_seconds", (1.0, 1.0, 1.0, 4.0), "contradicted"),
        (SLOWER, "step_seconds", (1.0, 1.0, 1.0, 9.0), "contradicted"),
        (CPU, "cpu_percent", (8.0, 9.0, 8.0, 12.0), "contradicted"),
        (CPU, "cpu_percent", (8.0, 8.1, 9.0, 12.0), NOT_TESTABLE),
        (GPU_MEMORY, "gpu_memory_bytes", ({"GPU 0": 30, "GPU 1": 1}, 30, 30, {"GPU 0": 5, "GPU 1": 6}), "confirmed"),
        (GPU_MEMORY, "gpu_memory_bytes", (30, 5, 30, 6), "contradicted"),
        (GAPS, "gpu_busy_percent", (99.0, 98.0, 80.0, 40.0), "confirmed"),
        (GAPS, "gpu_busy_percent", (99.0, 98.0, 99.0, 40.0), "contradicted"),
        (HOST_MEMORY, "tree_rss_bytes", (10, 10, 14, 50), "confirmed"),
        (HOST_MEMORY, "tree_rss_bytes", (10, 10, 11, 50), "contradicted"),
    ],
)
def test_each_conclusion_can_be_contradicted(claim: Claim, figure: str, values: tuple[Any, ...], verdict: str) -> None:
    assert judge(claim, stages("cuda", **{figure: values})).verdict == verdict


def test_the_spread_of_the_steps_decides() -> None:
    runs = stages(step_seconds=(1.0, 1.0, 1.1, 6.0), step_uncertainty=(0.05, 0.05, 0.05, 0.05))
    assert judge(TIE, runs).verdict == NOT_TESTABLE
    few = stages(step_seconds=(1.0, 1.0, 1.1, 6.0), steady_steps=(7, 51, 51, 51))
    assert judge(TIE, few).ours[0] == Quantity("stage1 / stage0, fewer than 8 steady steps", None)


def test_without_a_gpu_only_time_and_accuracy_are_testable() -> None:
    figures: dict[str, Any] = {
        "step_seconds": (1.0, 1.0, 1.0, 6.3),
        "cpu_percent": (1, 2, 3, 4),
        "tree_rss_bytes": (1, 1, 9, 9),
    }
    runs = [*stages("cpu", **figures), run("zero3", "cpu", base_accuracy=0.0, tuned_accuracy=1.0)]
    verdicts = [judge(claim, runs) for claim in CLAIMS]
    assert [made.verdict for made in verdicts] == ["confirmed"] * 2 + [NOT_TESTABLE] * 4 + ["confirmed"]
    assert verdicts[2].ours[0].value == 2.0, "our numbers are shown all the same"


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"),
    [(0.0, 1.0, "confirmed"), (0.0, 0.955, "confirmed"), (0.0, 0.9, "contradicted"), (0.1, 1.0, "contradicted")],
)
def test_accuracy_before_and_after(base: float, tuned: float, verdict: str) -> None:
    """Only one configuration has asked the base model."""
    runs = [run("one_process", base_accuracy=base, tuned_accuracy=1.0), run("zero3", tuned_accuracy=tuned)]
    assert judge(ACCURACY, runs).verdict == verdict


def test_what_was_not_run_is_not_testable() -> None:
    assert {judge(claim, []).verdict for claim in CLAIMS} == {NOT_TESTABLE}
    table = conclusions([run("zero3")])
    assert table[1]["ours"] == "reference-stage1, reference-stage3_offload: not measured here"
    assert table[1]["rule"].endswith("5.04 to 7.875")


def timed(name: str, seconds: float, uncertainty: float = 0.01, steps: int = 50, **more: Any) -> Run:
    rounds = {"first round": seconds, "second round": seconds}
    figures: dict[str, Any] = {
        "step_seconds": seconds,
        "step_uncertainty": uncertainty,
        "steady_steps": steps,
        "step_rounds": rounds,
    }
    return run(name, **figures, **more)


def test_runs_that_were_timed_once_are_named() -> None:
    once = run("b", step_seconds=1.0)
    said = "Timed once: b; a difference between them may be the machine's own, from run to run."
    assert sentences([timed("a", 2.0), once])[1] == said
    assert not [line for line in sentences([once]) if line.startswith("Timed once")], "nothing is compared"


def test_the_fastest() -> None:
    assert sentences([timed("a", 2.0), timed("b", 1.0), timed("c", 1.01), timed("d", 1.05)])[0] == (
        "Fastest: b, 1 s a step (median), not clearly faster than c; slowest: a, 2.00 times that."
    )
    assert sentences([timed("a", 0.5)])[0] == "Fastest: a, 0.5 s a step (median)."
    assert sentences([run("a")])[0] == "Fastest: not measured here."


def test_the_least_memory_of_each_kind() -> None:
    a = run("a", peak_bytes={"rank 0": 4e9, "rank 1": 1e9}, tree_rss_bytes=9e9)
    b = run("b", peak_bytes={"rank 0": 2e9, "rank 1": 3e9}, tree_rss_bytes=8.9e9)
    assert sentences([a, b])[1:] == [
        "Least CUDA allocator, peak of a rank: b, 3,000.0 MB.",
        "Least resident host memory of all processes: b, 8,900.0 MB (within 2 % of it: a).",
        "Least memory of the fullest GPU: not measured here.",
    ]


def test_what_offload_costs() -> None:
    """The sentences compare a configuration with one of the same stage that does not offload."""
    runs = [
        timed("zero2", 1.0, stage=2, peak_bytes=1e9),
        timed("zero3", 2.0, stage=3, peak_bytes={"rank 0": 5e9}, tree_rss_bytes=1e9),
        timed("off3", 3.0, stage=3, offloaded=["optimizer to cpu", "param to cpu"], peak_bytes=4e9, tree_rss_bytes=3e9),
        timed("off1", 3.0, stage=1, offloaded=["optimizer to cpu"]),
    ]
    assert sentences(runs)[4:] == [
        "Offload of optimizer to cpu and param to cpu (off3) costs, against zero3: step time 1.50 ± 0.03 times; CUDA "
        "allocator, peak of a rank -1,000.0 MB; resident host memory of all processes +2,000.0 MB; memory of the "
        "fullest GPU not measured here.",
        "Offload of optimizer to cpu (off1): nothing of stage 1 without offload to compare with.",
    ]
