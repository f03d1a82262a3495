"""Compares figures with sums, medians and maxima computed by hand from the numbers in tests/sample_runs.py."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import UserError
from eval.reporting.run_summary import derived_columns, read_run, sample_figures, usage_figures, with_second_round
from tests.sample_runs import SAMPLES, STEADY, usage, write_configuration, write_evaluation, write_run

MB = 1_000_000
COMPARISON = {"machine": {"cores": 4}, "matmul_peak_flops": {"cpu": 4e8}}


def test_steps_are_steady_after_the_first_tenth() -> None:
    figures = usage_figures(usage(), {})
    assert figures["steady_steps"] == 17
    assert figures["step_seconds"] == 2.0
    assert figures["step_quartiles"] == {"lower quartile": 1.0, "upper quartile": 4.0}
    assert figures["step_uncertainty"] == pytest.approx(1.57 * 3.0 / math.sqrt(17) / 2.0)


@pytest.mark.parametrize(("steps", "left_out"), [(4, 3), (30, 3), (31, 4), (57, 6), (285, 29)])
def test_at_least_three_steps_and_a_tenth_warm_up(steps: int, left_out: int) -> None:
    figures = usage_figures(usage() | {"step_seconds": [float(number) for number in range(steps)]}, {})
    assert figures["steady_steps"] == steps - left_out
    assert figures["step_seconds"] == (left_out + steps - 1) / 2


@pytest.mark.parametrize("steps", [0, 3])
def test_a_run_too_short_to_be_steady_has_no_step_time(steps: int) -> None:
    figures = usage_figures(usage() | {"step_seconds": [1.0] * steps}, COMPARISON)
    assert not {"step_seconds", "samples_per_second", "mfu"} & set(figures)


def test_the_uncertainty_has_the_difference_between_rounds() -> None:
    """A machine that is half as fast in the second round: 2 s and 4 s a step are 3 s, give or take 1 s and a notch."""
    first = usage_figures(usage(), COMPARISON)
    slower = usage_figures(usage() | {"step_seconds": [2 * seconds for seconds in usage()["step_seconds"]]}, COMPARISON)
    both = with_second_round(first, slower)
    assert both["step_seconds"] == 3.0
    assert both["step_rounds"] == {"first round": 2.0, "second round": 4.0}
    assert both["step_uncertainty"] == pytest.approx(1.57 * 3.0 / math.sqrt(17) / 2.0 + 1 / 3)
    assert both["samples_per_second"] == pytest.approx(8.0 * 2 / 3)
    assert both["mfu"] == pytest.approx(0.25 * 2 / 3)
    assert with_second_round(first, {}) == first


def test_a_configurations_second_round_is_read(tmp_path: Path) -> None:
    write_configuration(tmp_path / "a", usage(), 100.0)
    alone = read_run("a", tmp_path / "a", COMPARISON)
    assert "step_rounds" not in alone.figures
    (tmp_path / "a" / "again").mkdir()
    (tmp_path / "a" / "again" / "usage.json").write_text(json.dumps(usage() | {"step_seconds": [6.0] * 20}))
    assert read_run("a", tmp_path / "a", COMPARISON).figure("step_seconds") == 4.0


def test_throughput_is_of_steady_steps() -> None:
    """The run learns from 320 rows and 6400 tokens in 20 steps; a steady step takes 2 s."""
    figures = usage_figures(usage(), {})
    assert figures["samples_per_second"] == pytest.approx(8.0)
    assert figures["tokens_per_second"] == pytest.approx(160.0)


def test_flops_utilisation() -> None:
    """4 GFLOP in 20 steps of 2 s are 100 MFLOP/s. The CPU can do 400 MFLOP/s, each of the two GPUs 200 MFLOP/s."""
    cpu = usage_figures(usage(), {"matmul_peak_flops": {"cpu": 4e8}, "matmul_peak_flops_fp32": {"cpu": 1e8}})
    assert cpu["mfu"] == pytest.approx(0.25)
    gpu = usage_figures(usage(device_type="cuda"), {"matmul_peak_flops": {"cuda": 2e8}})
    assert gpu["mfu"] == pytest.approx(0.25)
    full = usage_figures(
        usage(precision="no"), {"matmul_peak_flops": {"cpu": 4e8}, "matmul_peak_flops_fp32": {"cpu": 1e8}}
    )
    assert full["mfu"] == pytest.approx(1.0)
    assert usage_figures(usage(), {"matmul_peak_flops": {}})["mfu"] is None


def test_peaks_are_of_each_rank_and_of_the_largest_rank_in_each_phase() -> None:
    figures = usage_figures(usage(), {})
    assert figures["peak_bytes"] == {"rank 0": 700 * MB, "rank 1": 800 * MB}
    assert figures["phase_peak_bytes"] == {"load": 500 * MB, "forward": 800 * MB, "backward": None}


def test_communication_is_a_steps_of_the_rank_with_most() -> None:
    """Rank 0 moves 80 MB in 20 steps and rank 1 moves 70 MB. What the ranks move while they load does not count."""
    figures = usage_figures(usage(), {})
    assert figures["communication_bytes"] == pytest.approx(4 * MB)
    assert figures["collective_bytes"] == pytest.approx({"all_gather": 3 * MB, "reduce_scatter": 2 * MB})


def test_collectives_of_ddp_are_not_seen() -> None:
    assert not {"communication_bytes", "collective_bytes"} & set(usage_figures(usage(engine="PyTorch DDP"), {}))


def test_samples(tmp_path: Path) -> None:
    write_configuration(tmp_path / "zero3", usage(), 100.5)
    figures = read_run("zero3", tmp_path / "zero3", COMPARISON).figures
    assert figures["wall_seconds"] == 100.5
    assert figures["sampling_share"] == 0.0042
    assert figures["machine_cpu_percent"] == pytest.approx(30.0)
    assert figures["cpu_percent"] == pytest.approx(50.0), "200 % of a core on four"
    assert figures["tree_rss_bytes"] == 900 * MB
    assert figures["tree_shared_bytes"] == 7 * MB
    assert figures["tree_swap_bytes"] is None, "its cells are empty"
    assert figures["machine_used_bytes"] == 500 * MB, "beyond the first sample"
    assert figures["rank_rss_bytes"] == {"rank 0": 400 * MB, "rank 1": 360 * MB}
    assert figures["gpu_memory_bytes"] is None
    assert figures["gpu_utilisation_percent"] is None
    assert figures["mfu"] == pytest.approx(0.25)


def test_gpus_in_use_are_those_whose_memory_grows() -> None:
    columns: dict[str, list[float | None]] = {
        "seconds": [1.0, 2.0, 3.0, 4.0, 5.0],
        "gpu0_utilisation_percent": [0.0, 80.0, 40.0, 90.0, 0.0],
        "gpu0_memory_bytes": [1e9, 20e9, 30e9, 30e9, 1e9],
        "gpu1_utilisation_percent": [0.0, 60.0, 20.0, None, 0.0],
        "gpu1_memory_bytes": [1e9, 25e9, 28e9, 28e9, 1e9],
        "gpu2_utilisation_percent": [0.0] * 5,
        "gpu2_memory_bytes": [40e9] * 5,
    }
    derived = derived_columns(columns, 4)
    assert derived["gpu_utilisation_percent"] == [0.0, 70.0, 30.0, 90.0, 0.0]
    assert derived["gpu_memory_bytes"] == [1e9, 25e9, 30e9, 30e9, 1e9]
    figures = sample_figures(columns | derived)
    assert figures["gpu_utilisation_percent"] == pytest.approx(38.0)
    assert figures["gpu_busy_percent"] == pytest.approx(200 / 3), "70 and 90 of 70, 30 and 90"
    assert figures["gpu_memory_bytes"] == {"GPU 0": 30e9, "GPU 1": 28e9, "GPU 2": 40e9}


def test_the_end_of_the_losses_and_the_accuracies(tmp_path: Path) -> None:
    write_run(tmp_path / "run", usage())
    write_evaluation(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/loss": 1.5, "train/grad_norm": null}\n')
    figures = read_run("run", tmp_path / "run").figures
    assert (figures["final_loss"], figures["final_validation_loss"]) == (1.5, 2.5)
    assert (figures["base_accuracy"], figures["tuned_accuracy"]) == (0.0, 0.975)


def test_a_training_that_failed_has_curves_but_no_figures(tmp_path: Path) -> None:
    write_configuration(tmp_path / "zero3", None, 12.0, status="failed", reason="out of memory")
    run = read_run("zero3", tmp_path / "zero3", COMPARISON)
    assert len(run.samples["tree_rss_bytes"]) == len(run.metrics) == 3
    assert set(run.figures) == {"final_loss", "final_validation_loss"}


@pytest.mark.parametrize("half", ['{"step": 5, "tr', "{", '{"step": 5, "train/loss": "王'])
def test_half_a_last_line_is_left_out(half: str, tmp_path: Path) -> None:
    write_configuration(tmp_path / "zero3", usage(), 1.0)
    for file in ("run/metrics.jsonl", "samples.csv"):
        with (tmp_path / "zero3" / file).open("ab") as lines:
            lines.write(half.encode()[:-1] if file.endswith("jsonl") else b"2.0,10.0,1")
    run = read_run("zero3", tmp_path / "zero3", COMPARISON)
    assert [line["step"] for line in run.metrics] == [1, 2, 4]
    assert run.samples["seconds"] == [0.5, 1.0, 1.5]


def test_a_last_line_that_is_whole_but_for_its_end_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.0}')
    assert read_run("run", tmp_path / "run").figures["final_loss"] == 3.0


def replace(old: str, new: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(file.read_text().replace(old, new, 1))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "half a JSON": ("run/usage.json", lambda file: file.write_text('{"step_seconds": ['), "Expecting value"),
    "empty": ("run/usage.json", lambda file: file.write_text(""), "Expecting value"),
    "a list": ("run/versions.json", lambda file: file.write_text("[]"), "it has no keys"),
    "no JSON's number": ("run/usage.json", replace("9.0", "NaN"), "nan is no number"),
    "another type": ("run/usage.json", replace("9.0", '"9"'), "'9' is no number"),
    "a key less": ("run/usage.json", replace('"rows"', '"row"'), "'rows' is missing"),
    "no time": ("run/usage.json", lambda file: file.write_text(json.dumps(usage([0.0] * len(STEADY)))), "division by"),
    "half a line in the middle": ("run/metrics.jsonl", replace("}\n", "\n"), "line 1: "),
    "no step": ("run/metrics.jsonl", replace('"step"', '"stop"'), "'step' is missing"),
    "bytes": ("run/metrics.jsonl", lambda file: file.write_bytes(b"\xff\xfe\n"), "codec can't decode"),
    "YAML": ("run/recipe.yaml", lambda file: file.write_text("a: [b"), "while parsing"),
    "ragged": ("samples.csv", replace("0.5,10.0,", "0.5,"), "argument"),
    "no number": ("samples.csv", replace("10.0", "ten"), "could not convert"),
    "no seconds": ("samples.csv", replace("seconds", "second"), "'seconds' is missing"),
    "no accuracy": ("run/eval.json", lambda file: file.write_text('{"base": {}}'), "'accuracy' is missing"),
    "no stage": (
        "run/deepspeed_config.json",
        lambda file: file.write_text('{"zero_optimization": [1]}'),
        "list indices",
    ),
    "a folder": ("run/answers.jsonl", lambda file: file.mkdir(), "Is a directory"),
    "no wall time": ("result.json", replace("1.0", "null"), "None is no number"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    name, damages, said = DAMAGES[damage]
    write_configuration(tmp_path / "zero3", usage(), 1.0)
    damages(tmp_path / "zero3" / name)
    with pytest.raises(UserError, match=said) as raised:
        read_run("zero3", tmp_path / "zero3", COMPARISON)
    assert str(tmp_path / "zero3" / name) in str(raised.value)


def test_samples_without_a_row_are_none(tmp_path: Path) -> None:
    write_configuration(tmp_path / "zero3", usage(), 1.0)
    (tmp_path / "zero3" / "samples.csv").write_text(SAMPLES.partition("\n")[0] + "\n")
    assert read_run("zero3", tmp_path / "zero3", COMPARISON).figures["tree_rss_bytes"] is None
