"""eval.run on two processes: they share the prompts, and say what one process says."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.launching import launch_command
from tests.distributed.launching import CONFIGS, DEBUG, launch, start


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = launch(CONFIGS / "zero2.yaml", *DEBUG, folder=tmp_path_factory.mktemp("trained") / "run", processes=1)
    assert done.code == 0, done.output
    return done.folder


def answers(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]


def test_two_processes_say_what_one_says(run: Path, tmp_path: Path) -> None:
    asked = ["eval.run", "--run", str(run), "--limit", "7", "--verify", "5"]
    one = start([sys.executable, "-m", *asked], tmp_path)
    assert one.code == 0, one.output
    alone, scores = answers(run), json.loads((run / "eval.json").read_text())["scores"]
    assert len(alone) == 2 * 7
    two = start([*launch_command(CONFIGS / "zero3.yaml"), "--module", *asked], tmp_path)
    assert two.code == 0, two.output
    assert answers(run) == alone
    shared = json.loads((run / "eval.json").read_text())["scores"]
    for label in ("base", "tuned"):
        for key in ("accuracy", "prefix_rate", "verified", "different"):
            assert shared[label][key] == scores[label][key]
        assert shared[label]["verified"] == 5
    assert two.output.count("asking the base model 7 questions") == 1


def test_fewer_prompts_than_processes(run: Path, tmp_path: Path) -> None:
    asked = ["eval.run", "--run", str(run), "--limit", "1"]
    done = start([*launch_command(CONFIGS / "zero3.yaml"), "--module", *asked], tmp_path)
    assert done.code == 0, done.output
    assert len(answers(run)) == 2


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    done = start([*launch_command(CONFIGS / "zero3.yaml"), "--module", "eval.run", "--run", "nowhere"], tmp_path)
    assert done.code != 0
    assert done.output.count("error: nowhere: no recipe.yaml in there") == 1
