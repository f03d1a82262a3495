"""The plan against the real engine: bytes exact, gathers exact, and what usage.json says of a run."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import CONFIGS, Run, launch
from tests.plan_measured import EXACT, TINY, WORKER, Cell, arguments, compare, measure, plan, subject, write_rows

CELLS = [
    Cell("zero0", 2),
    Cell("zero1", 2),
    Cell("zero2", 2),
    Cell("zero2_offload", 2),
    Cell("zero3", 2),
    Cell("zero3_offload", 2),
    Cell("zero3", 2, "none"),
    Cell("zero3", 2, "reentrant"),
    Cell("zero2_offload", 1),
    Cell("zero3", 1),
]
ROWS = 32


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), ROWS)


@pytest.fixture(scope="session")
def run(rows: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    base = tmp_path_factory.mktemp("runs")
    return cache(lambda cell: measure(TINY, rows, cell, base / f"{cell.config}-{cell.processes}-{cell.checkpointing}"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_what_a_rank_holds_is_exact(cell: Cell, rows: Path, run) -> None:  # type: ignore[no-untyped-def]
    found = compare(plan(TINY, rows, cell), run(cell), cell)
    assert {key: pair[0] for key, pair in found.exact.items()} == {key: pair[1] for key, pair in found.exact.items()}
    assert set(found.exact) == set(EXACT)
    if cell.processes > 1:  # alone, nothing is gathered from anybody
        assert found.gathered[0] == found.gathered[1]


def test_gathers_are_exact_where_little_is_kept(rows: Path, tmp_path: Path) -> None:
    """With a small reuse distance each layer is gathered forward and backward, and not for the recomputation."""
    config = {
        "zero_optimization": {
            "stage": 3,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 60_000,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 3072,
            "reduce_bucket_size": "auto",
        },
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": "auto",
    }
    (tmp_path / "small.json").write_text(json.dumps(config))
    text = (CONFIGS / "reference" / "stage3_offload.yaml").read_text()
    text = text.replace("accel_configs/reference/deepspeed/stage3_offload.json", str(tmp_path / "small.json"))
    (tmp_path / "small.yaml").write_text(text)
    cell = Cell("small", 2)
    done = launch(tmp_path / "small.yaml", *arguments(TINY, rows, cell), folder=tmp_path / "run", script=WORKER)
    assert done.code == 0, done.output
    planned = plan(TINY, rows, cell, tmp_path)
    assert planned.gathered_bytes == json.loads((tmp_path / "run" / "held.json").read_text())[0]["gathered"]
    passes = usage(done)["ranks"][0]["phases"]
    steps, layers = ROWS // 8, 4
    # Each way one gather for a layer, and one for the head; forward also for the embeddings. The first step has one
    # more each way, before DeepSpeed knows the order.
    assert passes["forward"]["collectives"]["all_gather"]["count"] == steps * (layers + 2) + 1
    assert passes["backward"]["collectives"]["all_gather"]["count"] == steps * (layers + 1) + 1
    in_layers = 2 * sum(size for size in subject(TINY, rows, "non_reentrant").base if 3072 < size < 100_000)
    assert 2 * in_layers <= planned.gathered_bytes < 2.5 * in_layers


def usage(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run.folder / "usage.json").read_text())
    return result


def test_usage_counts_steps_rows_and_tokens(rows: Path, run) -> None:  # type: ignore[no-untyped-def]
    cell = Cell("zero0", 2)
    told = usage(run(cell))
    examples = subject(TINY, rows, cell.checkpointing).work.examples or []
    steps = math.ceil(ROWS / 8)
    assert (told["first_step"], told["last_step"], len(told["step_seconds"])) == (0, steps, steps)
    assert told["rows"] == ROWS
    assert told["tokens"] == sum(e.length for e in examples)
    assert told["label_tokens"] == sum(e.num_labels for e in examples)
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
    phases = told["ranks"][0]["phases"]
    assert {"start", "load", "data", "forward", "backward", "update", "save", "other"} <= phases.keys()
    step_phases = sum(phases[phase]["seconds"] for phase in ("data", "forward", "backward", "update"))
    assert sum(told["step_seconds"]) == pytest.approx(step_phases, rel=0.05)
    assert sum(phase["seconds"] for phase in phases.values()) <= told["wall_seconds"]


def test_usage_counts_what_is_reduced(rows: Path, run) -> None:  # type: ignore[no-untyped-def]
    """Stage 0 sums every gradient up once a step, in bf16."""
    told = usage(run(Cell("zero0", 2)))
    for rank in told["ranks"]:
        backward = rank["phases"]["backward"]["collectives"]["all_reduce"]
        assert backward["bytes"] == told["last_step"] * 2 * told["trainable"]


def test_stage_3_gathers_once_after_an_update(tmp_path: Path) -> None:
    """DeepSpeed itself would do so once for every adapter and norm."""
    done = launch(CONFIGS / "zero3.yaml", "--config", "loop/recipes/debug.yaml", folder=tmp_path / "run")
    assert done.code == 0, done.output
    told = usage(done)
    for rank in told["ranks"]:
        assert rank["phases"]["update"]["collectives"]["all_gather"]["count"] == told["last_step"]


def test_a_run_ends_with_the_command_of_its_report(rows: Path, run) -> None:  # type: ignore[no-untyped-def]
    done = run(Cell("zero0", 2))
    assert f"report: python -m eval.report {done.folder}\n" in done.output
