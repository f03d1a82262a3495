"""Signals, dead ranks and frozen ranks: everything ends, says why, and leaves whole checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loop.checkpoint import list_checkpoints, load_checkpoint
from tests.distributed.launching import CONFIGS, DEBUG, ROOT, clean_environment
from tests.faults import children, kill_matrix, last_step

ENDLESS = ("--epochs", "10000", "--save_every", "1000", "--rank_timeout", "5")
BOUND = 25  # seconds from the signal to the end of all processes


class Running:
    """A training that goes on until it is stopped."""

    def __init__(self, folder: Path, launcher: bool, *arguments: str) -> None:
        self.folder, self.log = folder, folder.with_suffix(".txt")
        command = [sys.executable]
        if launcher:
            command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
            command += ["--config_file", str(CONFIGS / "zero3.yaml")]
        command += [str(ROOT / "loop" / "train.py"), *DEBUG, *ENDLESS, *arguments, "--run_dir", str(folder)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=out, stderr=out)
        while last_step(folder) < 5:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.ranks = children(self.process.pid) if launcher else [self.process.pid]

    def wait(self) -> str:
        """The output, once every process is gone."""
        self.process.wait(timeout=300)
        deadline = time.monotonic() + BOUND
        while any(Path(f"/proc/{pid}").exists() for pid in self.ranks):
            assert time.monotonic() < deadline, "a process stayed behind"
            time.sleep(0.1)
        return self.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["alone", "launcher", "rank 1"])
def test_a_signal_stops_every_rank_after_the_same_step(number: int, whom: str, tmp_path: Path) -> None:
    run = Running(tmp_path / "run", whom != "alone")
    os.kill(run.ranks[1] if whom == "rank 1" else run.process.pid, number)
    output = run.wait()
    assert run.process.returncode == (128 + number if whom == "alone" else 1), (
        "the launcher has but one code of failure"
    )
    if whom == "rank 1":
        assert output.count(f"exitcode  : {128 + number} ") == 2, "every rank's own"
    (folder,) = list_checkpoints(run.folder)
    assert load_checkpoint(folder).step == last_step(run.folder)
    assert f"stopped after step {last_step(run.folder)} as asked; go on with --resume {folder}" in output


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """While the first one waits for the end of a step that never comes: the process sleeps in it."""
    script = f"""
import sys, time
import loop.train
from unittest.mock import patch
real = loop.train.train_step
def slow(*args):
    slow.steps += 1
    if slow.steps == 8:
        open({str(tmp_path / "asleep")!r}, "w").close()
        while True:
            time.sleep(0.1)
    return real(*args)
slow.steps = 0
with patch("loop.train.train_step", slow):
    loop.train.main({[*DEBUG, *ENDLESS, "--save_every", "3", "--run_dir", str(tmp_path / "run")]!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=clean_environment())
    while not (tmp_path / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # a launcher's echo of the first
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=BOUND) == 130
    assert [load_checkpoint(folder).step for folder in list_checkpoints(tmp_path / "run")][-1] == 6


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_or_freezes_is_named(number: int, rank: int, tmp_path: Path) -> None:
    run = Running(tmp_path / "run", True)
    os.kill(run.ranks[rank], number)
    output = run.wait()
    assert run.process.returncode != 0
    (said,) = [line for line in output.splitlines() if line.startswith("error: ")]
    what = "died" if number == signal.SIGKILL else "has given no sign of life for"
    assert f"rank {rank} (process {run.ranks[rank]}) {what}" in said
    step = int(said.removeprefix("error: step ").partition(":")[0])
    assert last_step(run.folder) <= step <= last_step(run.folder) + 2


def test_no_rank_outlives_the_launcher(tmp_path: Path) -> None:
    run = Running(tmp_path / "run", True)
    os.kill(run.process.pid, signal.SIGKILL)
    assert "the launcher is gone" in run.wait()


def test_a_small_kill_matrix(tmp_path: Path) -> None:
    figures = kill_matrix(5, 1, tmp_path)
    assert figures.kills == 5
    assert figures.bit_equal == figures.runs > 0
    assert figures.torn_checkpoints == 0
    assert figures.most_steps_lost <= 2
