"""When a run ends, by max_steps or by patience, and which of its steps becomes adapter/."""

import json
import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import DEBUG, ROOT, Run, launch, without_clock
from tests.distributed.test_resume import config_file

PEAK, TOTAL, PATIENCE = 1e-2, 24, 3  # twelve epochs of two steps
ADAPTER = "adapter_model.safetensors"
ZERO3, ALONE = ("zero3", 2, "bf16"), ("single_cpu", 1, "no")


@pytest.fixture(scope="session")
def contradicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validation rows with the questions of the training rows and other answers. The loss of such a row falls while the
    model learns to answer shortly, and rises when it learns the sums."""
    lines = (ROOT / "data" / "math" / "debug.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["instruction"] for line in lines[:3]]
    rows = [{"instruction": question, "output": answer} for question in questions for answer in ("--->", "5 + 5")]
    file = tmp_path_factory.mktemp("rows") / "validation.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def train(launched: tuple[str, int, str], folder: Path, rows: Path, *more: str) -> Run:
    name, processes, precision = launched
    words = ["--data.validation_file", str(rows), "--eval_every", "1", "--log_every", "1", "--save_total_limit", "99"]
    words += ["--epochs", "12", "--optim.lr", str(PEAK), "--lora.dropout", "0.1"]
    words += ["--micro_batch_size", "1", "--grad_accum_steps", str(4 // processes), *more]
    return launch(config_file(name), *DEBUG, *words, folder=folder, processes=processes, precision=precision)


@pytest.fixture(scope="session")
def whole(contradicting: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that does a run to its last step, with a checkpoint after each, once."""
    base = tmp_path_factory.mktemp("whole")

    @cache
    def run(launched: tuple[str, int, str]) -> Run:
        done = train(launched, base / launched[0], contradicting, "--save_every", "1")
        assert done.code == 0, done.output
        assert len(done.series("val/loss")) == TOTAL
        return done

    return run


@pytest.fixture(scope="session")
def patient(contradicting: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that does the same run with patience, and with the lowest val/loss as adapter/, once."""
    base = tmp_path_factory.mktemp("patient")

    @cache
    def run(launched: tuple[str, int, str]) -> Run:
        waits = ("--patience", str(PATIENCE), "--choose_by", "val/loss")
        done = train(launched, base / launched[0], contradicting, *waits)
        assert done.code == 0, done.output
        return done

    return run


def course(losses: list[float]) -> tuple[int, int]:
    """The steps of the lowest loss and of the end, read from the losses after each step."""
    for end in range(1, len(losses) + 1):
        best = losses.index(min(losses[:end])) + 1
        if end - best == PATIENCE:
            return best, end
    raise AssertionError(f"val/loss did not rise: {losses}")


def of(folder: Path) -> bytes:
    return (folder / ADAPTER).read_bytes()


def checkpoint(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step:06d}"


@pytest.mark.parametrize("launched", [ZERO3, ALONE], ids=str)
def test_patience_ends_a_run_and_the_lowest_becomes_the_adapter(launched: Any, whole: Any, patient: Any) -> None:
    """Against a run of all steps: the same until the end, which is read from its losses."""
    every, waits = whole(launched), patient(launched)
    losses = every.series("val/loss")
    best, end = course(losses)
    assert end < TOTAL
    assert without_clock(waits) == without_clock(every)[:end]
    said = f"val/loss has not been lower than {losses[best - 1]:.4f} (step {best}) for {PATIENCE} validations"
    assert f"ended after step {end}: {said}" in waits.output
    assert json.loads((waits.folder / "usage.json").read_text())["last_step"] == end
    assert of(checkpoint(waits, end)) == of(checkpoint(every, end)), "the last step is saved"

    assert of(waits.folder / "adapter") == of(checkpoint(every, best))
    assert of(waits.folder / "adapter") != of(checkpoint(every, end))
    assert f"adapter (step {best} of {end}, lowest val/loss {losses[best - 1]:.4f})" in waits.output
    told = json.loads((waits.folder / "adapter" / "chosen.json").read_text())
    assert (told["step"], told["by"], told["value"]) == (best, "val/loss", losses[best - 1])
    assert told["of"].items() <= {str(step): loss for step, loss in enumerate(losses, start=1)}.items()
    assert of(every.folder / "adapter") == of(checkpoint(every, TOTAL)), "without a choice it is the last"
    assert f"adapter (step {TOTAL} of {TOTAL}, the last)" in every.output


@pytest.mark.parametrize("launched", [ZERO3, ALONE], ids=str)
def test_killed_while_it_waits_it_ends_at_the_same_step(
    launched: Any, patient: Any, contradicting: Path, tmp_path: Path
) -> None:
    """The kill comes after the last checkpoint before the end; the lowest of the run lies behind it, or before it."""
    run = patient(launched)
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (*before, last) = sorted((tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(last)
    assert before[-1].name >= f"step-{course(run.series('val/loss'))[0]:06d}"
    waits = ("--patience", str(PATIENCE), "--choose_by", "val/loss", "--resume", "auto")
    resumed = train(launched, tmp_path / "run", contradicting, *waits)
    assert resumed.code == 0, resumed.output
    assert without_clock(resumed) == without_clock(run)
    for file in (last.name + "/optimizer.safetensors", last.name + "/" + ADAPTER):
        assert (resumed.folder / "checkpoints" / file).read_bytes() == (run.folder / "checkpoints" / file).read_bytes()
    assert of(resumed.folder / "adapter") == of(run.folder / "adapter")
    assert (resumed.folder / "adapter" / "chosen.json").read_bytes() == (
        run.folder / "adapter" / "chosen.json"
    ).read_bytes()


def test_a_run_that_has_ended_says_so_and_goes_on_with_more_patience(
    whole: Any, patient: Any, contradicting: Path, tmp_path: Path
) -> None:
    run, every = patient(ALONE), whole(ALONE)
    _, end = course(run.series("val/loss"))
    shutil.copytree(run.folder, tmp_path / "run")
    again = train(ALONE, tmp_path / "run", contradicting, "--patience", str(PATIENCE), "--resume", "auto")
    assert again.code == 0, again.output
    assert f"ended after step {end}: val/loss has not been lower than" in again.output
    assert "It goes on with --resume and a larger --patience." in again.output
    assert without_clock(again) == without_clock(run)
    assert of(again.folder / "adapter") == of(checkpoint(every, end)), "the last one, as this command asks"

    longer = train(ALONE, tmp_path / "run", contradicting, "--patience", str(TOTAL), "--resume", "auto")
    assert longer.code == 0, longer.output
    assert "ended after step" not in longer.output
    assert without_clock(longer) == without_clock(every), "it is the run that never ended"
    assert of(longer.folder / "adapter") == of(every.folder / "adapter")


def test_losses_on_other_rows_are_forgotten(patient: Any, tmp_path: Path) -> None:
    """With other validation rows the same run goes on, and waits anew."""
    run = patient(ALONE)
    _, end = course(run.series("val/loss"))
    shutil.copytree(run.folder, tmp_path / "run")
    rows = ROOT / "data" / "math" / "debug.jsonl"
    more = ("--patience", str(PATIENCE), "--max_steps", str(TOTAL), "--choose_by", "val/loss", "--resume", "auto")
    other = train(ALONE, tmp_path / "run", rows, *more)
    assert other.code == 0, other.output
    assert "note: the validation rows are others than before" in other.output
    assert len(other.metrics) >= min(end + PATIENCE, TOTAL)
    told = json.loads((other.folder / "adapter" / "chosen.json").read_text())
    assert min(map(int, told["of"])) > end


def cosine(step: int, total: int) -> float:
    """The learning rate of a step in closed form: a warm-up of one step, then half a cosine."""
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - 2) / (total - 1))) if step > 1 else 0.0


@pytest.mark.parametrize("launched", [ZERO3, ALONE], ids=str)
def test_max_steps_in_the_middle_of_an_epoch(launched: Any, whole: Any, contradicting: Path, tmp_path: Path) -> None:
    """The schedule ends there; a cut run goes on to the bit; and another max_steps is another length of the run."""
    often = ("--save_every", "2", "--eval_every", "4")
    run = train(launched, tmp_path / "whole", contradicting, *often, "--max_steps", "5")
    assert run.code == 0, run.output
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in run.metrics if "val/loss" in line] == [4, 5], "the last step is validated"
    assert run.series("train/lr") == pytest.approx([cosine(step, 5) for step in range(1, 6)], rel=1e-6)
    assert run.series("train/loss")[:2] == whole(launched).series("train/loss")[:2], (
        "the same rows, from the same start"
    )
    assert "5 (12 epochs of 2, cut short by max_steps), 1 of them warm-up" in run.output
    assert of(run.folder / "adapter") == of(checkpoint(run, 5))

    shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    resumed = train(launched, tmp_path / "run", contradicting, *often, "--max_steps", "5", "--resume", "auto")
    assert resumed.code == 0, resumed.output
    assert without_clock(resumed) == without_clock(run)
    for file in (
        "adapter/" + ADAPTER,
        f"checkpoints/step-000005/{ADAPTER}",
        "checkpoints/step-000005/optimizer.safetensors",
    ):
        assert (resumed.folder / file).read_bytes() == (run.folder / file).read_bytes(), file

    longer = train(launched, tmp_path / "run", contradicting, *often, "--max_steps", "9", "--resume", "auto")
    assert longer.code == 0, longer.output
    assert (
        "until step 5 this was a run of 12 epochs (max_steps 5). From here it goes on as one of 12 epochs"
        in longer.output
    )
    assert longer.series("train/lr")[5:] == pytest.approx([cosine(step, 9) for step in range(6, 10)], rel=1e-6)
    shorter = train(launched, tmp_path / "run", contradicting, *often, "--max_steps", "7", "--resume", "auto")
    assert shorter.code != 0
    assert "9 steps are learned, and the run would have 7. Give a larger max_steps." in shorter.output
