"""An interrupted run that goes on is the uninterrupted run: to the bit where nothing else changed."""

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, TRAIN, Run, launch, without_clock

STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
STEPS = 6  # three epochs of two steps: one of four rows and one of three
MIDDLE = 3  # steps learned where the run is resumed: in the middle of an epoch


def config_file(name: str) -> Path:
    return CONFIGS / f"{name}.yaml" if name in STAGES else ROOT / "tests" / "accel_configs" / f"{name}.yaml"


def train(
    name: str, folder: Path, processes: int, precision: str, dropout: float, *more: str, script: Path = TRAIN
) -> Run:
    rows = ["--micro_batch_size", "1", "--grad_accum_steps", str(4 // processes)]
    often = ["--epochs", "3", "--save_every", "1", "--save_total_limit", "9", "--log_every", "2"]
    return launch(
        config_file(name),
        *(*DEBUG, *rows, *often, "--optim.lr", "3e-3", "--lora.dropout", str(dropout), *more),
        folder=folder,
        processes=processes,
        precision=precision,
        script=script,
    )


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that does a run without interruption, once."""
    base = tmp_path_factory.mktemp("whole")

    @cache
    def run(name: str, processes: int, precision: str, dropout: float) -> Run:
        done = train(name, base / f"{name}-{processes}-{precision}-{dropout}", processes, precision, dropout)
        assert done.code == 0, done.output
        return done

    return run


def cut(run: Run, folder: Path) -> None:
    """A copy of `run` as a crash after step MIDDLE would have left it: without later checkpoints and the adapter."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "adapter")
    for step in range(MIDDLE + 1, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}")


@pytest.mark.parametrize(
    ("name", "processes", "precision"),
    [
        *((stage, 2, "bf16") for stage in STAGES),
        ("zero3", 2, "no"),
        *(pytest.param(stage, 2, "no", marks=pytest.mark.slow) for stage in ("zero0", "zero2_offload")),
        *(("ddp_gpus", 2, "bf16"), ("single_cpu", 1, "no")),
    ],
)
def test_to_the_bit(name: str, processes: int, precision: str, whole: Any, tmp_path: Path) -> None:
    run = whole(name, processes, precision, 0.2)
    cut(run, tmp_path / "run")
    resumed = train(name, tmp_path / "run", processes, precision, 0.2, "--resume", "auto")
    assert resumed.code == 0, resumed.output
    assert without_clock(resumed) == without_clock(run)
    assert [line["step"] for line in resumed.metrics] == [2, 4, 6]
    for file in ("adapter", *(f"checkpoints/step-{step:06d}" for step in range(MIDDLE + 1, STEPS + 1))):
        ours, theirs = ((r.folder / file / "adapter_model.safetensors").read_bytes() for r in (resumed, run))
        assert ours == theirs, file
    last = Path("checkpoints") / f"step-{STEPS:06d}" / "optimizer.safetensors"
    assert (resumed.folder / last).read_bytes() == (run.folder / last).read_bytes()


FULL_MEMORY = ROOT / "tests" / "distributed" / "full_memory_worker.py"
AUTO = ("--gradient_checkpointing", "auto", "--batching", "auto")


def decided(run: Run) -> tuple[str, str]:
    """What the run folder says was decided."""
    recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    return recipe["batching"], recipe["gradient_checkpointing"]


def test_to_the_bit_with_auto_where_memory_has_become_short(tmp_path: Path) -> None:
    """What was decided when the run began is what is done after it was resumed. Two rows share a micro-batch here."""
    rows = ("--micro_batch_size", "2", "--grad_accum_steps", "1")
    more = (*rows, *AUTO)
    run = train("zero3", tmp_path / "whole", 2, "bf16", 0.2, *more)
    assert run.code == 0, run.output
    layout, checkpointing = decided(run)
    assert checkpointing == "none"
    assert layout in ("padded", "packed", "shared_prefix")
    cut(run, tmp_path / "run")
    resumed = train("zero3", tmp_path / "run", 2, "bf16", 0.2, *more, "--resume", "auto", script=FULL_MEMORY)
    assert resumed.code == 0, resumed.output
    assert decided(resumed) == (layout, "none")
    assert without_clock(resumed) == without_clock(run)
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step-{STEPS:06d}/optimizer.safetensors"):
        assert (resumed.folder / file).read_bytes() == (run.folder / file).read_bytes(), file
    fresh = train("zero3", tmp_path / "fresh", 2, "bf16", 0.2, *more, "--epochs", "1", script=FULL_MEMORY)
    assert decided(fresh) == (layout, "non_reentrant"), "a run that begins there decides otherwise"


def test_the_same_run_twice_is_the_same(whole: Any, tmp_path: Path) -> None:
    first, second = whole("zero3", 2, "bf16", 0.2), train("zero3", tmp_path / "run", 2, "bf16", 0.2)
    assert without_clock(first) == without_clock(second)
    adapters = [(run.folder / "adapter" / "adapter_model.safetensors").read_bytes() for run in (first, second)]
    assert adapters[0] == adapters[1]
    dry = train("zero3", tmp_path / "dry", 2, "bf16", 0.0)
    assert dry.series("train/loss") != first.series("train/loss"), "there was dropout"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--optim.lr", "1e-3"], "optim.lr: 0.003 then, 0.001 now"),
        (["--lora.alpha", "16", "--epochs", "4"], "lora.alpha: 64 then, 16"),
        (["--seed", "1"], "seed: 42 then, 1 now"),
        (["--data.train_file", "data/math/math_eval_200.json"], "is not that of the run's file"),
        (["--grad_accum_steps", "3"], "4 rows then, 3 now; keep it with --micro_batch_size 1 --grad_accum_steps 4"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_mathematics_is_refused(change: list[str], said: str, whole: Any, tmp_path: Path) -> None:
    run = whole("single_cpu", 1, "no", 0.2)
    cut(run, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    resumed = train("single_cpu", tmp_path / "run", 1, "no", 0.2, "--resume", "auto", *change)
    assert resumed.code != 0
    assert "this would not be the same run" in resumed.output
    assert said in resumed.output
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before, "nothing is touched"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero0", 2), ("zero3", 1)),
        (("zero3", 2), ("zero0", 2)),
        (("zero3", 2), ("zero2_offload", 1)),
        (("zero2_offload", 2), ("zero1", 4)),
        (("single_cpu", 1), ("zero3", 2)),
        (("zero0", 2), ("single_cpu", 1)),
    ],
    ids=str,
)
def test_on_another_topology(before: Any, after: Any, whole: Any, tmp_path: Path) -> None:
    run = whole(*before, "no", 0.0)
    cut(run, tmp_path / "run")
    resumed = train(after[0], tmp_path / "run", after[1], "no", 0.0, "--resume", "auto")
    assert resumed.code == 0, resumed.output
    for key in ("train/loss", "train/lr", "train/grad_norm", "val/loss"):
        assert resumed.series(key) == pytest.approx(run.series(key), rel=1e-5), key
    ours, theirs = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (resumed, run))
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_with_auto_another_number_of_processes_needs_no_edit(tmp_path: Path) -> None:
    """Two processes learn two rows each a step, one process four; the rows of a step are the recipe's."""
    more = ("--rows_per_step", "4", "--micro_batch_size", "auto", "--grad_accum_steps", "1")
    run = train("zero0", tmp_path / "whole", 2, "no", 0.0, *more)
    assert run.code == 0, run.output
    assert "2 rows x 1 accumulated x 2 processes = 4 rows" in run.output
    cut(run, tmp_path / "run")
    resumed = train("zero3", tmp_path / "run", 1, "no", 0.0, *more, "--resume", "auto")
    assert resumed.code == 0, resumed.output
    assert "2 rows x 2 accumulated x 1 processes = 4 rows" in resumed.output, "the micro-batch of the run is kept"
    for key in ("train/loss", "train/lr", "train/grad_norm", "val/loss"):
        assert resumed.series(key) == pytest.approx(run.series(key), rel=1e-5), key
    alone = train("zero0", tmp_path / "alone", 1, "no", 0.0, *more)
    assert "4 rows x 1 accumulated x 1 processes = 4 rows" in alone.output
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert alone.series(key) == pytest.approx(run.series(key), rel=1e-5), key


def cosine(step: int, total: int) -> float:
    """The learning rate of a step in closed form: a warm-up of one step, then half a cosine."""
    return 3e-3 * 0.5 * (1 + math.cos(math.pi * (step - 2) / (total - 1)))


def longer(run: Run, folder: Path, name: str, processes: int, precision: str, *more: str, total: int) -> None:
    """`run` goes on to `total` steps, with the rates of so long a run; and once more with a crash on the way."""
    shutil.copytree(run.folder, folder / "run")
    done = train(name, folder / "run", processes, precision, 0.2, "--resume", "auto", "--log_every", "1", *more)
    assert done.code == 0, done.output
    assert done.output.count(f"note: until step {STEPS} this was a run of ") == 1
    assert without_clock(done)[:3] == without_clock(run)
    assert [line["step"] for line in done.metrics[3:]] == list(range(STEPS + 1, total + 1))
    rates = [cosine(step, total) for step in range(STEPS + 1, total + 1)]
    assert done.series("train/lr")[3:] == pytest.approx(rates, rel=1e-6)

    shutil.copytree(done.folder, folder / "again")
    shutil.rmtree(folder / "again" / "adapter")
    for step in range(STEPS + 2, total + 1):
        shutil.rmtree(folder / "again" / "checkpoints" / f"step-{step:06d}")
    again = train(name, folder / "again", processes, precision, 0.2, "--resume", "auto", "--log_every", "1", *more)
    assert again.code == 0, again.output
    assert "note: until step" not in again.output, "by now it is a run of so many epochs and rows"
    assert without_clock(again) == without_clock(done)
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/step-{total:06d}/optimizer.safetensors"):
        assert (again.folder / file).read_bytes() == (done.folder / file).read_bytes(), file


@pytest.mark.parametrize(("name", "processes", "precision"), [("zero3", 2, "bf16"), ("single_cpu", 1, "no")])
def test_training_longer(name: str, processes: int, precision: str, whole: Any, tmp_path: Path) -> None:
    run = whole(name, processes, precision, 0.2)
    longer(run, tmp_path, name, processes, precision, "--epochs", "5", total=10)


def test_with_more_rows(whole: Any, tmp_path: Path) -> None:
    """Seven rows become ten: three steps an epoch, and nine in three epochs."""
    rows = (ROOT / "data" / "math" / "debug.jsonl").read_text(encoding="utf-8").splitlines()
    more = json.loads((ROOT / "data" / "math" / "math_train_1798.json").read_text(encoding="utf-8"))[:3]
    file = tmp_path / "more.jsonl"
    file.write_text("\n".join([*rows, *map(json.dumps, more)]), encoding="utf-8")
    run = whole("single_cpu", 1, "no", 0.2)
    longer(run, tmp_path, "single_cpu", 1, "no", "--data.train_file", str(file), total=9)
