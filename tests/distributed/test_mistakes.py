"""A user's mistake, on one process and on two: one message, a failing exit, nothing written, no hang."""

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, launch, start

MISTAKES = {
    "unknown key": (["--optim.momentum", "0.9"], "optim.momentum"),
    "no data": (["--data.train_file", "nowhere.json"], "nowhere.json: cannot be read"),
    "no model": (["--model.name_or_path", "./nowhere"], "there is no folder ./nowhere"),
    "no target": (["--lora.target_modules", "[q_proj, z_proj]"], "has no layers named z_proj"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_on_one_process(mistake: str, tmp_path: Path) -> None:
    arguments, said = MISTAKES[mistake]
    folder = tmp_path / "run"
    run = start([sys.executable, "loop/train.py", *DEBUG, *arguments, "--run_dir", str(folder)], folder)
    assert run.code == 2, run.output
    assert run.output.count("error: ") == 1
    assert said in run.output
    assert "Traceback" not in run.output
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        MISTAKES["no target"],  # found last, after all ranks have met
        (["--grad_accum_steps", "1", "--optim.max_grad_norm", "0.5"], "gradient_clipping: 1.0, but"),
    ],
)
def test_on_two_processes(arguments: list[str], said: str, tmp_path: Path) -> None:
    config = ROOT / "tests" / "accel_configs" / "deepspeed_zero1_clip.yaml"
    if "--grad_accum_steps" not in arguments:
        config = CONFIGS / "zero3.yaml"
    run = launch(config, *DEBUG, *arguments, folder=tmp_path / "run")
    assert run.code != 0
    codes = re.findall(r"exitcode  : (-?\d+) ", run.output)
    assert len(codes) == 2, "every rank's own; the launcher has but one"
    assert "2" in codes
    assert set(codes) <= {"2", str(-signal.SIGTERM)}, "the launcher ends whoever is still closing down"
    assert run.output.count("error: ") == 1, run.output
    assert said in run.output
    assert not run.folder.exists()


def test_a_run_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    run = start([sys.executable, "loop/train.py", *DEBUG, "--run_dir", str(tmp_path)], tmp_path)
    assert run.code == 2
    assert "is not an empty folder" in run.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
