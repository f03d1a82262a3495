"""A disk that takes no more: one error on all ranks, no hang, and the checkpoints before it stay whole."""

import shlex
import sys
from pathlib import Path

from loop.checkpoint import list_checkpoints, load_checkpoint
from tests.distributed.launching import CONFIGS, DEBUG, ROOT, Run, launch, start

LIMIT = 500  # KiB a file: an adapter of 160 KB fits, its optimizer state of 950 KB does not


def with_small_files(folder: Path, *arguments: str) -> Run:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    command += ["--config_file", str(CONFIGS / "zero3.yaml"), str(ROOT / "loop" / "train.py"), *DEBUG, *arguments]
    line = f"ulimit -f {LIMIT}; exec {shlex.join([*command, '--run_dir', str(folder)])}"
    return start(["bash", "-c", line], folder)


def test_a_file_size_limit_in_the_middle_of_a_run(tmp_path: Path) -> None:
    run = launch(CONFIGS / "zero3.yaml", *DEBUG, "--save_total_limit", "9", folder=tmp_path / "run")
    assert run.code == 0, run.output
    first, second = list_checkpoints(run.folder)
    for file in second.iterdir():
        file.unlink()
    second.rmdir()
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    full = with_small_files(run.folder, "--resume", "auto")
    assert full.code != 0
    assert full.output.count("\nerror: ") == 1, full.output  # once, not per rank
    assert f"{second} could not be written" in full.output
    assert "MB are free there" in full.output
    assert "Traceback" not in full.output.split("error: ")[0]
    assert list_checkpoints(run.folder) == [first]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    assert load_checkpoint(first).step == 1
    assert not list(run.folder.glob("checkpoints/.*")), "what was begun is cleared away"


def test_a_run_folder_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = f"""
import shutil
import loop.train
from unittest.mock import patch
real = loop.train.save_checkpoint
def vanish(*args):
    shutil.rmtree({str(folder)!r})
    return real(*args)
with patch("loop.train.save_checkpoint", vanish):
    loop.train.main({[*DEBUG, "--run_dir", str(folder)]!r})
"""
    run = start([sys.executable, "-c", script], folder)
    assert run.code == 1, run.output
    assert run.output.count("\nerror: ") == 1
    assert "step-000002 could not be written" in run.output
    assert "Traceback" not in run.output
    assert not folder.exists(), "and it is not made anew around half a run"
