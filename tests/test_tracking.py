"""metrics.jsonl is the truth; a tracker may fail in any way without stopping the run."""

import contextlib
import json
import math
import os
import pty
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import yaml
from accelerate import Accelerator

from loop.recipe import parse_recipe
from loop.telling.tracking import TrackerThread, Tracking, tracker_config
from tests.distributed.launching import DEBUG, EXTENSIONS, ROOT, start
from tests.tracker_faults import FAULTS, run_with, what_is_wrong
from tests.warm import clean_environment


def track(tmp_path: Path, tracker: str) -> Tracking:
    recipe = parse_recipe(["--tracker", tracker])[1]
    return Tracking(recipe, tmp_path, 0, 4, Accelerator(cpu=True))


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    with track(tmp_path, "null") as tracking:
        tracking.log(1, {"train/loss": 2.0})
        tracking.log(2, {"train/loss": 1.0, "val/loss": 3.0})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines == [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0, "val/loss": 3.0}]
        tracking.log(3, {"train/loss": 1.0, "train/grad_norm": math.inf, "val/loss": math.nan})
        last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
        assert last == '{"step": 3, "train/loss": 1.0, "train/grad_norm": null, "val/loss": null}', (
            "JSON for any reader"
        )


def test_a_tracker_that_is_not_there_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with track(tmp_path, "no_such_tracker") as tracking:
        for step in (1, 2, 3):
            tracking.log(step, {"train/loss": 1.0})
    assert capsys.readouterr().out.count("warning: the tracker stopped") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_breaks_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with track(tmp_path, "null") as tracking:
        tracking.tracker = TrackerThread(lambda: None, lambda: None, tracking.say)
        tracking.backend = SimpleNamespace(log=lambda *args, **kwargs: 1 / 0)
        for step in (1, 2, 3):
            tracking.log(step, {"train/loss": 1.0})
    assert capsys.readouterr().out.count("division by zero") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_gets_everything_before_it_is_finished() -> None:
    got: list[str] = []
    tracker = TrackerThread(lambda: got.append("start"), lambda: got.append("finish"), print)
    for number in range(3):
        tracker.jobs.put(partial(got.append, str(number)))
    tracker.close()
    assert got == ["start", "0", "1", "2", "finish"]


@pytest.mark.parametrize("hangs_for", [0, 10, 1000])
def test_patience_counts_from_where_it_began_to_hang(hangs_for: float) -> None:
    """So a network that fell silent in the middle of a run costs nothing at its end."""
    hang = threading.Event()
    waits: list[float] = []

    def job() -> None:
        hang.wait()

    tracker = TrackerThread(lambda: None, lambda: None, print)
    tracker.jobs.put(job)
    tracker.started.wait()
    while tracker.jobs.qsize():
        time.sleep(0.01)
    tracker.job_begun -= hangs_for
    with patch.object(tracker.thread, "join", waits.append):
        tracker.close()
    hang.set()
    expected = max(TrackerThread.HASTE, TrackerThread.PATIENCE - hangs_for)
    assert waits == [pytest.approx(expected, abs=5)]
    assert waits[0] >= TrackerThread.HASTE


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_hangs_is_left_behind(where: str) -> None:
    """A whole process, because hanging goes on in the tracker's own hook at the end of it."""
    script = f"""
import atexit, threading
from loop.guard.process import end_process
from loop.telling.tracking import TrackerThread
hang = threading.Event().wait
atexit.register(hang)
TrackerThread.PATIENCE = 0.5
def main(argv):
    tracker = TrackerThread(*(hang if name == {where!r} else print for name in ("start", "finish")), print)
    tracker.jobs.put(hang if {where!r} == "log" else print)
    tracker.close()
    print("closed")
end_process(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-3:] == [
        "warning: the tracker did not come to an end and is left behind",
        "closed",
        "",
    ]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.launches
def test_a_run_comes_to_its_end_whatever_its_tracker_does(fault: str, tmp_path: Path) -> None:
    assert what_is_wrong(fault, run_with(fault, tmp_path)) is None


def test_config_shows_what_the_reference_shows() -> None:
    config = tracker_config(parse_recipe([])[1])
    assert config["model"] == "data/tiny_base"
    assert config["dataset"] == "data/math/math_train_1798.json"
    assert (config["lora_rank"], config["lora_alpha"], config["lora_dropout"]) == (8, 64, 0.01)
    assert all(isinstance(value, str | int | float | bool | None) for value in config.values())


@pytest.mark.launches
def test_swanlab_never_asks_in_a_terminal(tmp_path: Path) -> None:
    """Online without an account, with a terminal in front of it: it goes on without SwanLab."""
    folder = tmp_path / "run"
    command = [sys.executable, "loop/train.py", *DEBUG, "--tracker", "swanlab", "--run_dir", str(folder)]
    terminal, run_end = pty.openpty()
    env = clean_environment() | {"HOME": str(tmp_path), "SWANLAB_MODE": "online", "TORCH_EXTENSIONS_DIR": EXTENSIONS}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=run_end, stdout=run_end, stderr=run_end) as process:
        os.close(run_end)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while part := os.read(terminal, 65536):
                shown += part
                if b"Enter your choice" in shown:
                    process.kill()
    os.close(terminal)
    assert process.returncode == 0, shown.decode()
    assert shown.count(b"warning: the tracker stopped") == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.launches
def test_swanlab_runs_offline_without_account_or_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "loop/train.py", *DEBUG, "--tracker", "swanlab", "--run_dir", str(folder)]
    run = start(command, folder, {"HOME": str(home), "TORCH_EXTENSIONS_DIR": EXTENSIONS})
    assert run.code == 0, run.output
    assert "warning: the tracker" not in run.output
    assert len(run.metrics) == 4
    config = next((folder / "swanlog").glob("*/files/config.yaml"))
    assert yaml.safe_load(config.read_text())["lora_rank"]["value"] == 8
