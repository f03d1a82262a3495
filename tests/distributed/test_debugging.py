"""`python loop/train.py` without a launcher: the same loop and engine in one process, and a debugger stops in it."""

import sys
from pathlib import Path

from tests.distributed.launching import DEBUG, ROOT, start


def test_plain_python_runs_the_same_engine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start([sys.executable, "loop/train.py", *DEBUG, "--run_dir", str(folder)], folder)
    assert run.code == 0, run.output
    assert "DeepSpeed ZeRO-3" in run.output
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    assert len(run.series("val/loss")) == 2
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_validates_as_often_as_asked(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    often = ["--eval_every", "1", "--log_every", "3", "--run_dir", str(folder)]
    run = start([sys.executable, "loop/train.py", *DEBUG, *often], folder)
    assert run.code == 0, run.output
    assert [line["step"] for line in run.metrics if "val/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in run.metrics if "train/loss" in line] == [2, 3, 4]  # an epoch's last step too


def test_from_any_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*DEBUG, "--run_dir", "run"]
    script = f"import os; os.chdir({str(tmp_path)!r}); from loop.train import main; main({arguments!r})"
    run = start([sys.executable, "-c", script], folder)
    assert run.code == 0, run.output
    assert len(run.metrics) == 4


def test_pdb_stops_inside_the_step(tmp_path: Path) -> None:
    lines = (ROOT / "loop" / "step.py").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if "accelerator.backward(loss)" in text)
    commands = [f"break step.py:{line}", "continue", "p 'loss is', loss.item(), nll.requires_grad", "quit"]
    pdb = [part for command in commands for part in ("-c", command)]
    folder = tmp_path / "run"
    run = start([sys.executable, "-m", "pdb", *pdb, "loop/train.py", *DEBUG, "--run_dir", str(folder)], folder)
    assert "('loss is', " in run.output, run.output
    assert "True)" in run.output
    assert run.series("train/loss") == []
