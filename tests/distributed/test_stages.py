"""A part of the equality matrix (tests/equality.py) in every test run, and what every stage leaves behind."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.distributed.launching import Run
from tests.equality import STAGES, Cell, compare, history, reference, run_cell, tolerance, write_task

# The last window has five rows: with two processes and accumulation 4, three of its eight places have no row.
EVERY_STAGE = [Cell(stage, 2, 4, "non_reentrant", layout="shared_prefix") for stage in STAGES]
OTHER_WAYS = [
    Cell("zero3", 1, 1, "none", layout="packed"),
    Cell("zero3", 1, 4, "reentrant"),
    Cell("zero3", 2, 1, "reentrant", layout="shared_prefix"),
    Cell("zero2", 2, 2, "none", layout="packed"),
    Cell("zero0", 1, 8, "none"),
    Cell("zero0", 2, 1, "none"),
    Cell("zero0", 2, 4, "non_reentrant", "bf16"),
    Cell("zero3", 2, 4, "non_reentrant", "bf16", layout="shared_prefix"),
]


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def train(task: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A function that launches a cell, once."""
    base = tmp_path_factory.mktemp("runs")

    @cache
    def run(cell: Cell) -> Run:
        done = run_cell(cell, task, base / str(cell))
        assert done.code == 0, done.output
        return done

    return run


@pytest.mark.parametrize("cell", EVERY_STAGE + OTHER_WAYS, ids=str)
def test_is_the_reference(cell: Cell, task: Path, train) -> None:  # type: ignore[no-untyped-def]
    """Per-step loss, gradient norm and learning rate, and the final adapter: within 1e-5 in fp32."""
    run = train(cell)
    assert len(run.series("train/loss")) == 20
    found, limit = compare(history(run), reference(task, cell.precision)), tolerance(cell, task)
    assert found.within(limit), f"{found}, but at most {limit}"
    assert run.series("train/loss")[-2] < 0.97 * run.series("train/loss")[0], "nothing was learned"


@pytest.mark.parametrize("cell", EVERY_STAGE, ids=str)
def test_adapter_is_whole_and_base_untouched(cell: Cell, task: Path, train) -> None:  # type: ignore[no-untyped-def]
    run = train(cell)
    check = json.loads((run.folder / "base_check.json").read_text())
    assert check["different"] == []
    assert check["compared"] > 40
    model = AutoModelForCausalLM.from_pretrained(task / "model")
    plain = {name: parameter.shape for name, parameter in model.named_parameters()}
    tuned = PeftModel.from_pretrained(model, str(run.folder / "adapter"))
    tensors = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 4 * 7 * 2, "4 layers, 7 projections, A and B"
    for name, tensor in tensors.items():
        layer, _, which = name.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        d_out, d_in = plain[f"{layer}.weight"]
        assert tensor.shape == {"lora_A": (8, d_in), "lora_B": (d_out, 8)}[which]
        assert torch.count_nonzero(tensor) > 0
        assert torch.equal(tuned.get_parameter(name.replace(".weight", ".default.weight")), tensor)


@pytest.mark.parametrize("count", [1, 7, 33])
def test_rows_that_nothing_divides(count: int, tmp_path: Path) -> None:
    """On two processes with accumulation 4: no row is lost or repeated, each weighs what its label tokens do."""
    task = write_task(tmp_path, count)
    rows = str(task / "rows.jsonl")
    run = run_cell(
        Cell("zero3", 2, 4, "none", layout="auto"),
        task,
        tmp_path / "run",
        "--data.validation_file",
        rows,
        "--eval_every",
        "1",
        *(("--epochs", "2") if count < 33 else ()),  # a single step would be warm-up, and is refused
    )
    judge = reference(task, "no")
    assert run.code == 0, run.output
    steps = len(judge.loss)
    assert run.series("train/loss")[:steps] == pytest.approx(judge.loss, rel=1e-5)
    assert run.series("train/grad_norm")[:steps] == pytest.approx(judge.grad_norm, rel=1e-5)
    # the first learning rate is 0, so the first validation sees the initial model: on all rows at once
    assert run.series("val/loss")[0] == pytest.approx(reference(task, "no", count).loss[0], rel=1e-5)


@pytest.mark.parametrize(("stage", "tied"), [("zero0", True), ("zero2_offload", True), ("zero3", False)])
def test_lm_head_as_a_target(stage: str, tied: bool, tmp_path: Path) -> None:
    """Trained as the reference trains it, and whole in the adapter's file."""
    run_with_lm_head(stage, tied, tmp_path)


def test_lm_head_is_resumed_to_the_bit(tmp_path: Path) -> None:
    cell, options, run = run_with_lm_head("zero3", True, tmp_path)
    shutil.rmtree(run.folder / "checkpoints" / "step-000004")
    (run.folder / "adapter").rename(tmp_path / "whole")
    first = run.folder / "checkpoints" / "step-000002"
    resumed = run_cell(cell, tmp_path, run.folder, *options, "--resume", str(first))
    assert resumed.code == 0, resumed.output
    folders = (tmp_path / "whole", run.folder / "adapter")
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == other.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def run_with_lm_head(stage: str, tied: bool, folder: Path) -> tuple[Cell, tuple[str, ...], Run]:
    """Trains four steps in `folder`, on rows and a model made there, and compares them with the reference."""
    task, targets = write_task(folder, 32, tied), ("q_proj", "lm_head")
    cell = Cell(stage, 2, 2, "non_reentrant", layout="shared_prefix")
    options = ("--lora.target_modules", f"[{', '.join(targets)}]", "--save_every", "2")
    run = run_cell(cell, task, folder / "run", *options)
    assert run.code == 0, run.output
    found = compare(history(run), reference(task, "no", targets=targets))
    assert found.within(tolerance(cell, task)), found
    held = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert len(held) == 2 * (4 + 1), "4 layers and lm_head, A and B"
    return cell, options, run
