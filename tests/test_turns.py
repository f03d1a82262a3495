"""Tests what the benchmarks share: taking turns, launching, and writing figures."""

import re
import sys
from pathlib import Path

import pytest

from benchmarks.launching import run_to_end
from benchmarks.turns import spread, take_turns
from loop.recipe import ROOT

CONTENDER = """
import sys, time
from pathlib import Path
from benchmarks.turns import Turns
name, log, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
turns = Turns(steps)
for step in range(1000):
    turns.before_step()
    if name == "dies" and step == 2:
        sys.exit("I was not up to it")
    with log.open("a") as file:
        file.write(f"{name} begins\\n")
        time.sleep(0.01)
        file.write(f"{name} ends\\n")
    turns.after_step(step=step)
"""


def command(name: str, log: Path, steps: int = 2) -> list[str]:
    return [sys.executable, "-c", CONTENDER, name, str(log), str(steps)]


@pytest.mark.launches
def test_one_at_a_time_and_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    found = take_turns({name: command(name, log) for name in ("a", "b", "c")}, rounds=3, threads=1)
    expected = [f"{name} {what}" for _ in range(4) for name in "abc" for _ in range(2) for what in ("begins", "ends")]
    assert log.read_text().split("\n")[:-1] == expected
    for measured in found.values():
        assert len(measured.seconds) == 3, "the first turn does not count"
        assert all(seconds >= 0.02 for seconds in measured.seconds)
        assert measured.notes == {"step": 7}


@pytest.mark.launches
def test_ranks_of_a_contender_go_together(tmp_path: Path) -> None:
    alone = command("x", tmp_path / "log")
    both = f"import subprocess; [each.wait() for each in [subprocess.Popen({alone!r}) for _ in 'ab']]"
    found = take_turns({"x": [sys.executable, "-c", both]}, rounds=1, threads=1, ranks={"x": 2})
    assert len(found["x"].seconds) == 1
    assert (tmp_path / "log").read_text().count("x ends") == 2 * 2 * 2


@pytest.mark.launches
def test_one_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"dies ended:\n(.*\n)*I was not up to it"):
        take_turns({name: command(name, tmp_path / "log") for name in ("a", "dies")}, rounds=3, threads=1)


def test_one_that_does_not_start_is_named() -> None:
    with pytest.raises(SystemExit, match=r"bad did not start:\n(.*\n)*nonsense"):
        take_turns({"bad": [sys.executable, "-c", "raise SystemExit('nonsense')"]}, rounds=1, threads=1)


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.5]) == "2.5 (1 to 3)"
    assert spread([6710.0, 998.0, 12345.6]) == "6,710 (998 to 12,346)"


def test_a_launch_starts_from_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "SWANLAB_MODE"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    printed = "import os, sys; print({k: v for k, v in os.environ.items() if v in '134'}, os.getcwd())"
    done = run_to_end([sys.executable, "-c", f"{printed}; sys.exit('it failed')"], {"ADDED": "4"})
    assert "'ADDED': '4'" in done.output
    assert "'OMP_NUM_THREADS': '1'" in done.output
    assert str(ROOT) in done.output
    assert not any(name in done.output for name in ("RANK", "WORLD_SIZE", "ACCELERATE", "SWANLAB"))
    assert (done.code, done.output.splitlines()[-1]) == (1, "it failed")


def test_benchmarks_import_no_tests() -> None:
    for file in (ROOT / "benchmarks").glob("*.py"):
        assert not re.search(r"^\s*(from|import) tests\b", file.read_text(), re.MULTILINE), file
