"""Two processes of a machine read and tokenize each row once, and learn what two that read for themselves would."""

from pathlib import Path

import yaml

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, launch

WORKER = ROOT / "tests" / "distributed" / "once_worker.py"
VALIDATION = ["data/math/debug.jsonl", "data/math/math_eval_200.json"]


def test_no_row_is_tokenized_twice(tmp_path: Path) -> None:
    notes, words = tmp_path / "notes.txt", ["--data.validation_file", f"[{', '.join(VALIDATION)}]"]
    run = launch(
        CONFIGS / "zero0.yaml", *DEBUG, *words, folder=tmp_path / "run", script=WORKER, env={"NOTES": str(notes)}
    )
    assert run.code == 0, run.output
    noted = [line.split() for line in notes.read_text().splitlines()]
    train = len((ROOT / "data" / "math" / "debug.jsonl").read_text().splitlines())
    assert {rank for rank, _ in noted} == {"0"}
    assert len(noted) == train + train + 200
    losses = [line for line in run.metrics if "val/loss" in line][-1]
    assert set(losses) >= {"val/loss", "val/loss/debug", "val/loss/math_eval_200"}
    low, high = sorted((losses["val/loss/debug"], losses["val/loss/math_eval_200"]))
    assert low < losses["val/loss"] < high, "the mean over all label tokens lies between those of the parts"
    recipe = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert recipe["data"]["validation_file"] == VALIDATION
    assert recipe["data"]["date"] is not None
    assert (run.folder / "adapter" / "chat_template.jinja").is_file()
