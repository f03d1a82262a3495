"""A run folder, its base model and its data may move: evaluation and resume know them by their content."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import DEBUG, ROOT, TRAIN, Run, start, without_clock

ADAPTER = Path("adapter") / "adapter_model.safetensors"
KEPT = ("--save_total_limit", "9", "--save_every", "1")


def python(cwd: Path, *words: str) -> tuple[int, str]:
    """The exit code and the output of `python …` in the folder `cwd`."""
    cwd.mkdir(exist_ok=True)
    run = start([sys.executable, *words], cwd, cwd=cwd)
    return run.code, run.output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run was trained with relative paths only; then run, model and data moved elsewhere."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(ROOT / "data" / "tiny_base", folder / "models" / "mine")
    shutil.copyfile(ROOT / "data" / "math" / "debug.jsonl", folder / "rows.jsonl")
    inputs = ["--model.name_or_path", "models/mine", "--data.train_file", "rows.jsonl"]
    code, said = python(folder, str(TRAIN), *DEBUG, *KEPT, *inputs, "--run_dir", "out")
    assert code == 0, said
    (folder / "moved").mkdir()
    (folder / "out").rename(folder / "moved" / "run")
    return folder


def test_a_moved_run_is_evaluated_from_another_folder(work: Path) -> None:
    code, said = python(work / "elsewhere", "-m", "eval.run", "--run", "../moved/run", "--limit", "2")
    assert code == 0, said
    assert (work / "moved" / "run" / "answers.jsonl").exists()


def test_with_its_model_moved_too(work: Path) -> None:
    (work / "models").rename(work / "other models")
    asked = ["-m", "eval.run", "--run", "../moved/run", "--limit", "2", "--adapter-only"]
    try:
        code, said = python(work / "elsewhere", *asked)
        assert code == 2
        assert said.count("error: ") == 1
        assert f"there is no folder {work / 'models' / 'mine'}" in said
        code, said = python(work / "elsewhere", *asked, "--model.name_or_path", "../other models/mine")
        assert code == 0, said
    finally:
        (work / "other models").rename(work / "models")


def test_another_model_is_refused(work: Path) -> None:
    shutil.copytree(work / "models" / "mine", work / "another")
    weights = work / "another" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    asked = ["-m", "eval.run", "--run", "../moved/run", "--limit", "2"]
    code, said = python(work / "elsewhere", *asked, "--model.name_or_path", "../another")
    assert code == 2
    assert "its content is not that of the model that the run has trained" in said
    code, said = python(work / "elsewhere", str(TRAIN), *resume(work, "../another", "../rows.jsonl"))
    assert code == 2
    assert "model: the content of ../another is not that of the run's base model" in said


def resume(work: Path, model: str, rows: str) -> list[str]:
    """The words for going on after the second of four steps in a copy of the run."""
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(work / "moved" / "run", copy)
    for later in ("checkpoints/step-000003", "checkpoints/step-000004", "adapter"):
        shutil.rmtree(copy / later)
    inputs = ["--model.name_or_path", model, "--data.train_file", rows]
    return [*DEBUG, *KEPT, *inputs, "--resume", "../copy/checkpoints/step-000002"]


def test_a_moved_run_goes_on_to_the_bit(work: Path) -> None:
    """From another folder, with model and rows under other paths."""
    shutil.copyfile(work / "rows.jsonl", work / "elsewhere rows.jsonl")
    shutil.copytree(work / "models" / "mine", work / "third")
    code, said = python(work / "elsewhere", str(TRAIN), *resume(work, "../third", "../elsewhere rows.jsonl"))
    assert code == 0, said
    whole, resumed = Run(work / "moved" / "run", 0, ""), Run(work / "copy", code, said)
    assert without_clock(resumed) == without_clock(whole)
    assert (resumed.folder / ADAPTER).read_bytes() == (whole.folder / ADAPTER).read_bytes()
