"""The whole promise: from accuracy 0.0 to at least 0.99 on the 200 held-out numbers, by the tiny recipe as it is."""

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import CONFIGS, launch, start


@pytest.mark.parametrize(
    "config", ["zero0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "zero3_offload"))]
)
def test_learns_the_task(config: str, tmp_path: Path) -> None:
    run = launch(CONFIGS / f"{config}.yaml", folder=tmp_path / "run")
    assert run.code == 0, run.output
    judged = start([sys.executable, "-m", "eval.run", "--run", str(run.folder)], run.folder)
    assert judged.code == 0, judged.output
    evaluation = json.loads((run.folder / "eval.json").read_text())
    scores = evaluation["scores"]
    assert scores.keys() == {"base", "tuned"}
    assert scores["base"]["accuracy"] == scores["base"]["prefix_rate"] == 0.0
    assert scores["tuned"]["accuracy"] >= 0.99
    answers = [json.loads(line) for line in (run.folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 400
    # judged once more, by other means
    right = 0
    for line in answers[200:]:
        x = int(line["instruction"].removesuffix("="))
        right += line["answer"] in {f"王大丫丫的回答是--->{a} + {x - a}" for a in range(x + 1)}
    assert right / 200 == scores["tuned"]["accuracy"]
    change = evaluation["comparisons"]["sums"]
    assert (change["difference"], len(change["better"]), change["worse"]) == (right / 200, right, [])
    assert "| accuracy | 0.000 | 1.000 | 0.000 |" in judged.output
