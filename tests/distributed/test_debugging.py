"""`python loop/train.py` without a launcher: the same loop and engine in one process, and a debugger stops in it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.distributed.launching import DEBUG, ROOT, start


def test_plain_python_runs_the_same_engine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start([sys.executable, "loop/train.py", *DEBUG, "--run_dir", str(folder)], folder)
    assert run.code == 0, run.output
    assert "DeepSpeed ZeRO-3" in run.output
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    assert len(run.series("val/loss")) == 2
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_validates_and_logs_as_often_as_asked(tmp_path: Path) -> None:
    """A validation between two logs takes nothing out of train/loss: the mean over all tokens since the last one."""
    runs = []
    for often in (["--eval_every", "1", "--log_every", "3"], ["--log_every", "1"]):
        folder = tmp_path / f"every-{often[-1]}"
        arguments = [*DEBUG, *often, "--lora.dropout", "0", "--run_dir", str(folder)]
        runs.append(start([sys.executable, "loop/train.py", *arguments], folder))
        assert runs[-1].code == 0, runs[-1].output
    seldom, each = runs
    assert [line["step"] for line in seldom.metrics if "val/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in seldom.metrics if "train/loss" in line] == [2, 3, 4]  # an epoch's last step too
    # debug.jsonl has seven rows: windows of four and three, in the order of each epoch
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_base")
    lines = (ROOT / "data" / "math" / "debug.jsonl").read_text().splitlines()
    lengths = np.array([len(tokenizer(json.loads(line)["output"])["input_ids"]) + 1 for line in lines])
    order = np.random.default_rng((42, 0)).permutation(7)
    labels = [lengths[order[:4]].sum(), lengths[order[4:]].sum()]
    mean = float(np.dot(each.series("train/loss")[:2], labels) / sum(labels))
    assert seldom.series("train/loss") == pytest.approx([mean, *each.series("train/loss")[2:]], rel=1e-5)


def test_from_any_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*DEBUG, "--run_dir", "run"]
    script = f"import os; os.chdir({str(tmp_path)!r}); from loop.train import main; main({arguments!r})"
    run = start([sys.executable, "-c", script], folder)
    assert run.code == 0, run.output
    assert len(run.metrics) == 4


def test_pdb_stops_inside_the_step(tmp_path: Path) -> None:
    lines = (ROOT / "loop" / "step.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if 'measured("backward")' in text)
    commands = [f"break step.py:{line}", "continue", "p 'loss is', loss.item(), nll.requires_grad", "quit"]
    pdb = [part for command in commands for part in ("-c", command)]
    folder = tmp_path / "run"
    run = start([sys.executable, "-m", "pdb", *pdb, "loop/train.py", *DEBUG, "--run_dir", str(folder)], folder)
    assert "('loss is', " in run.output, run.output
    assert "True)" in run.output
    assert run.series("train/loss") == []
