"""Signals, dead ranks and frozen ranks: everything ends, says why, and leaves whole checkpoints."""

import os
import signal
import time
from pathlib import Path

import pytest

from loop.saving.checkpoint import list_checkpoints, load_checkpoint
from tests.distributed.launching import CONFIGS, DEBUG, Running, last_step, launch
from tests.faults import kill_matrix


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
    *_, folder = list_checkpoints(run.folder)
    assert load_checkpoint(folder).step == last_step(run.folder)
    assert f"stopped after step {last_step(run.folder)} as asked; go on with --resume {folder}" in output


ENDLESS_STEP = """
import pathlib, sys, time
from unittest.mock import patch
import loop.train
from loop.guard.process import end_process
real = loop.train.train_step
def sleep_in_step_8(*args):
    sleep_in_step_8.steps += 1
    while sleep_in_step_8.steps == 8:
        pathlib.Path(sys.argv[0]).with_name("asleep").touch()
        time.sleep(0.1)
    return real(*args)
sleep_in_step_8.steps = 0
with patch("loop.train.train_step", sleep_in_step_8):
    end_process(loop.train.main)
"""


@pytest.mark.parametrize("launcher", [False, True])
def test_a_second_ctrl_c_stops_at_once(launcher: bool, tmp_path: Path) -> None:
    """While the first one waits for the end of a step that never comes."""
    (tmp_path / "endless.py").write_text(ENDLESS_STEP)
    run = Running(tmp_path / "run", launcher, "--save_every", "3", script=tmp_path / "endless.py")
    run.wait_until((tmp_path / "asleep").exists)
    run.process.send_signal(signal.SIGINT)
    if not launcher:
        run.process.send_signal(signal.SIGINT)  # a launcher's echo of the first
    time.sleep(1.5)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    run.wait()
    assert run.process.returncode == (1 if launcher else 130)
    assert load_checkpoint(list_checkpoints(run.folder)[-1]).step == (7 if launcher else 6), "the last one before"


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


BREAKS_FIRST = """
import os, signal, threading, time
from unittest.mock import patch
import loop.train
from loop.guard.process import end_process
from loop.guard.ranks import lives
def kill(pid):
    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)
    while lives(pid):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # as the launcher does
def fit(job, learner, state, guard, tracking):
    if job.accelerator.process_index == 0:
        time.sleep(1000)
    threading.Thread(target=kill, args=[guard.watch.pids[0]]).start()
    raise RuntimeError("connection closed by peer")
with patch("loop.train.fit", fit):
    end_process(loop.train.main)
"""


def test_a_death_is_named_where_the_launcher_sees_it_first(tmp_path: Path) -> None:
    """A rank's death breaks a collective of rank 1 a moment before its process is gone, and SIGTERM comes with that."""
    (tmp_path / "breaks.py").write_text(BREAKS_FIRST)
    run = launch(CONFIGS / "zero3.yaml", *DEBUG, folder=tmp_path / "run", script=tmp_path / "breaks.py")
    assert run.code != 0
    (line,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: step 1: rank 0 (process ")


FREEZES = """
import os, signal
from unittest.mock import patch
import loop.train
from loop.guard.process import end_process
real = loop.train.build_model
def freeze(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.{signal})
    return real(*args)
with patch("loop.train.build_model", freeze):
    end_process(loop.train.main)
"""


@pytest.mark.parametrize(("name", "said"), [("SIGSTOP", "has given no sign of life"), ("SIGKILL", "died")])
def test_a_rank_that_dies_or_freezes_before_the_first_step(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "freezes.py").write_text(FREEZES.format(signal=name))
    more = ["--rank_timeout", "5"]
    goes_on = name == "SIGKILL"
    if goes_on:
        assert launch(CONFIGS / "zero3.yaml", *DEBUG, folder=tmp_path / "run").code == 0
        more += ["--resume", "auto"]
    run = launch(CONFIGS / "zero3.yaml", *DEBUG, *more, folder=tmp_path / "run", script=tmp_path / "freezes.py")
    assert run.code != 0
    (line,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: step {3 if goes_on else 1}: rank 1 (process ")
    assert said in line
    assert run.folder.exists() == goes_on


LOADS = """
import pathlib, sys, time
from unittest.mock import patch
import loop.train
from loop.guard.process import end_process
def load(*args):
    pathlib.Path(sys.argv[0]).with_name("loads").touch()
    time.sleep(1000)
with patch("loop.train.build_model", load):
    end_process(loop.train.main)
"""


def test_a_signal_while_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(LOADS)
    run = Running(tmp_path / "run", True, script=tmp_path / "slow.py", until=(tmp_path / "loads").exists)
    run.process.terminate()
    output = run.wait()
    assert run.process.returncode == 1
    assert "error: " not in output, "it is none"
    assert not run.folder.exists()


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
