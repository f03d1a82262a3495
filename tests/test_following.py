"""Tests what is known of a run while it trains, against the real schedule and with files that grow and are replaced."""

import json
import math
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from eval.report import main
from eval.reporting.following import Follower, total_steps
from eval.reporting.watch import make_server
from loop.model.build import build_lr_scheduler
from loop.recipe import parse_recipe
from tests.distributed.launching import ROOT
from tests.serving import serving


@pytest.mark.parametrize(("total", "ratio"), [(285, 0.03), (285, 0.0), (7, 0.5), (57, 0.1), (2000, 0.03)])
def test_the_number_of_steps_follows_from_a_learning_rate(total: int, ratio: float) -> None:
    """The reference is the scheduler with which the loop trains."""
    recipe = parse_recipe(["--optim.warmup_ratio", str(ratio), "--optim.lr", "0.003"])[1]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.003)
    scheduler = build_lr_scheduler(recipe, optimizer, total)
    values = {"optim": {"lr": 0.003, "warmup_ratio": ratio}}
    logged, found = [], []
    for step in range(1, total + 1):
        logged.append((step, float(scheduler.get_last_lr()[0])))
        found.append(total_steps(values, logged))
        optimizer.step()
        scheduler.step()
    assert set(found) == {None, total}
    known = math.ceil(ratio * total) + 2  # the peak itself belongs to any number of steps, and two lines have to agree
    assert set(found[known:]) == {total}


def test_the_number_of_steps_of_another_schedule_is_not_known() -> None:
    values = {"optim": {"lr": 0.003, "warmup_ratio": 0.03}}
    assert total_steps(values, [(50, 0.003), (51, 0.003)]) is None
    assert total_steps(values, [(50, 0.0), (51, 0.0)]) is None
    assert total_steps(values, [(100, 0.0015), (101, 0.0015)]) is None, "a rate that does not fall"
    assert total_steps({}, [(50, 0.001), (51, 0.001)]) is None
    assert total_steps({"optim": {"lr": "auto"}}, [(50, 0.001), (51, 0.001)]) is None


def lines(*steps: int, **more: Any) -> str:
    return "".join(json.dumps({"step": step, "train/loss": 8.0 / step, **more}) + "\n" for step in steps)


def test_only_whole_lines_are_read_and_each_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1) + '{"step": 2, "train')
    follower.poll()
    assert [line["step"] for line in follower.lines] == [1]
    with file.open("a") as opened:
        opened.write('/loss": 3.0}\n' + "broken\n" + lines(3))
    follower.poll()
    assert [line["step"] for line in follower.lines] == [1, 2, 3]
    assert follower.lines[1]["train/loss"] == 3.0
    assert follower.generation == 0
    assert "1 lines cannot be read" in follower.status()
    assert [line["step"] for line in follower.told(2, 0)["lines"]] == [3]
    assert [line["step"] for line in follower.told(2, 7)["lines"]] == [1, 2, 3], "of another file"


@pytest.mark.parametrize("how", ["shorter", "replaced", "gone"])
def test_a_run_that_goes_on_from_a_checkpoint_is_read_anew(how: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(1, 2, 3))
    follower = Follower(tmp_path)
    follower.poll()
    if how == "shorter":
        file.write_text(lines(1, 2))
    else:
        (tmp_path / "new").write_text(lines(1, 2))
        file.unlink()
        if how == "gone":
            follower.poll()
            assert follower.lines == []
        (tmp_path / "new").rename(file)
    follower.poll()
    assert [line["step"] for line in follower.lines] == [1, 2]
    assert follower.generation > 0
    assert follower.told(3, 0)["since"] == 0


def test_the_time_left_follows_from_the_growth(tmp_path: Path) -> None:
    """Ten steps took 20 s, and a further second has passed: 275 steps are left, at 2 s each, less that second."""
    file, now = tmp_path / "metrics.jsonl", [1000.0]
    follower = Follower(tmp_path, clock=lambda: now[0])
    for step, at in ((5, 1000.0), (10, 1020.0 - 10.0), (15, 1020.0)):
        file.write_text((file.read_text() if file.exists() else "") + lines(step))
        os.utime(file, (at, at))
        follower.poll()
    now[0] = 1021.0
    assert follower.seconds_left(290) == pytest.approx(275 * 2.0 - 1.0)
    assert follower.seconds_left(None) is None
    assert follower.seconds_left(15) == 0.0


def test_what_is_told(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "run")
    follower.poll()
    assert follower.told()["status"].startswith("waiting: there is no folder")
    (tmp_path / "run").mkdir()
    follower.poll()
    assert follower.told()["status"] == "waiting: metrics.jsonl has no line yet"
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(lines(1, **{"val/loss": 2.5}) + lines(2) + '{"step": 3, "train/loss": NaN}\n')
    follower.poll()
    facts = follower.told()["facts"]
    assert facts["training loss"] == "not finite"
    assert facts["last validation"] == "2.5 (step 1)"
    assert facts["memory"] == "not known"
    assert facts["time left"] == "not known yet"
    json.dumps(follower.told(), allow_nan=False)
    with file.open("a") as opened:
        opened.write(lines(4, **{"train/peak_bytes": 3e8}) + lines(5))
    follower.poll()
    assert follower.facts()["memory"] == "peak of rank 0: 300 MB"


def served(folder: Path) -> AbstractContextManager[str]:
    return serving(make_server(folder, 0))


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        content: bytes = answer.read()
        return content


def test_the_server_answers_this_machine_only_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines(1, 2))
    with served(tmp_path) as address:
        page = get(f"{address}/").decode()
        assert f"Run {tmp_path.name}, while it trains" in page
        told = json.loads(get(f"{address}/metrics?since=1&generation=0"))
        assert [line["step"] for line in told["lines"]] == [2]
        assert len(json.loads(get(f"{address}/metrics?since=-5&generation=x"))["lines"]) == 2
        for path, headers, code in (
            ("/metrics.jsonl", {}, 404),
            ("/../metrics.jsonl", {}, 404),
            ("/metrics", {"Host": "attacker.example:80"}, 403),
        ):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(address + path, **headers)
            assert refused.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as address, pytest.raises(UserError, match=r"--port \d+ cannot be used"):
        make_server(tmp_path, int(address.rpartition(":")[2]))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a", "b", "--watch"], "Give one folder"),
        (["a", "--watch", "--out", "x"], "without --out"),
        (["a", "--port", "80"], "--port goes with --watch"),
        (["a", "--watch", "--port", "70000"], "--port 70000 cannot be used"),
    ],
)
def test_options_that_do_not_fit(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(argv)
    assert exit_code.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.launches
def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eval.report", str(tmp_path / "not there yet"), "--watch"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\nstopped watching; the run goes on\n"
    assert list(tmp_path.iterdir()) == []
