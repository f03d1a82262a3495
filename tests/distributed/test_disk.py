"""A disk that takes no more: one error on all ranks, no hang, and the checkpoints before it stay whole."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.launching import launch_command
from loop.saving.checkpoint import list_checkpoints, load_checkpoint
from tests.distributed.launching import CONFIGS, DEBUG, TRAIN, Run, launch, start

LIMIT = 500  # KiB a file: an adapter of 160 KB fits, its optimizer state of 950 KB does not


def with_small_files(folder: Path, *arguments: str) -> Run:
    command = [*launch_command(CONFIGS / "zero3.yaml"), str(TRAIN), *DEBUG, *arguments, "--run_dir", str(folder)]
    line = f"ulimit -f {LIMIT}; exec {shlex.join(command)}"
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


IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]


def can_mount() -> bool:
    """Not every system lets its users mount a file system that only they see."""
    try:
        tried = [*IN_NAMESPACE, "mount -t tmpfs none /mnt"]
        return subprocess.run(tried, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mount = pytest.mark.skipif(not can_mount(), reason="no mounting in a namespace of its own here")


def on_a_disk_of(size: str, tmp_path: Path, first: str, *arguments: str) -> Run:
    """Runs on two processes with the run folder on a file system of `size`, after the shell command `first`.

    What it leaves there is in the Run's folder afterwards.
    """
    disk, folder = tmp_path / "disk", tmp_path / "left behind"
    disk.mkdir()
    command = [*launch_command(CONFIGS / "zero3.yaml"), str(TRAIN), *DEBUG, *arguments]
    command += ["--run_dir", str(disk / "run")]
    script = f"""
mount -t tmpfs -o size={size} none {shlex.quote(str(disk))}
{first.format(disk=shlex.quote(str(disk)))}
{shlex.join(command)}
code=$?
cp -a {shlex.quote(str(disk / "run"))} {shlex.quote(str(folder))}
exit $code
"""
    return start([*IN_NAMESPACE, script], folder)


def is_one_error(run: Run, said: str) -> bool:
    (line,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "ree space" in line or "writable" in line, "what to do"
    assert "Traceback" not in run.output.split("\nerror: ")[0].replace("torch/distributed/elastic", "")
    return run.code != 0


@needs_mount
def test_a_disk_that_is_full_at_the_second_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of the debug recipe has 1.1 MB."""
    run = on_a_disk_of("1700k", tmp_path, "", "--save_total_limit", "9")
    assert is_one_error(run, "checkpoints/step-000002 could not be written")
    assert "No space left on device" in run.output
    (whole,) = list_checkpoints(run.folder)
    assert load_checkpoint(whole).step == 1
    assert [line["step"] for line in run.metrics] == [1, 2]


@needs_mount
def test_a_disk_that_is_full_at_a_log_line(tmp_path: Path) -> None:
    """Four pages hold what stands in the run folder before the first step."""
    run = on_a_disk_of("16k", tmp_path, "")
    assert is_one_error(run, "step 1: ")
    assert "metrics.jsonl could not be written" in run.output


@needs_mount
def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path) -> None:
    assert is_one_error(on_a_disk_of("4k", tmp_path, ""), "run cannot be written: No space left on device")


@needs_mount
def test_a_run_folder_that_is_read_only(tmp_path: Path) -> None:
    whole = launch(CONFIGS / "zero3.yaml", *DEBUG, folder=tmp_path / "whole")
    copy = f"cp -a {shlex.quote(str(whole.folder))} {{disk}}/run && mount -o remount,ro {{disk}}"
    run = on_a_disk_of("20m", tmp_path, copy, "--resume", "auto")
    assert is_one_error(run, "run cannot be written: Read-only file system")
    (first,) = list_checkpoints(run.folder)
    assert load_checkpoint(first).step == 2
    for path in whole.folder.rglob("*"):
        if path.is_file():
            assert (run.folder / path.relative_to(whole.folder)).read_bytes() == path.read_bytes()
