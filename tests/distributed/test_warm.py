"""A warm launch (tests/warm.py) is a cold one: the same processes, the same environment, the same run to the bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import CONFIGS, DEBUG, ROOT, Run, children, launch, start, without_clock
from tests.warm import clean_environment, popen

WORKER = ROOT / "tests" / "distributed" / "environment_worker.py"
WRITTEN = ROOT / "tests" / "accel_configs"
OF_A_LAUNCH = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")  # differ from one launch to the next


@pytest.mark.parametrize(
    ("config", "processes"),
    [
        (CONFIGS / "zero3.yaml", 2),
        (CONFIGS / "zero2.yaml", 1),
        (WRITTEN / "ddp_gpus.yaml", 2),
        (WRITTEN / "single.yaml", 1),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else str(value),
)
def test_a_rank_finds_the_same(config: Path, processes: int, tmp_path: Path) -> None:
    found: dict[bool, list[dict[str, Any]]] = {}
    for cold in (False, True):
        folder = tmp_path / "run"
        run = launch(config, "--flag", folder=folder, processes=processes, script=WORKER, cold=cold)
        assert run.code == 0, run.output
        files = sorted(folder.glob("process-*.json"))
        assert len(files) == processes
        found[cold] = [json.loads(file.read_text()) for file in files]
        for file, rank in zip(files, found[cold], strict=True):
            assert all(rank["environment"].pop(name, "") != "" for name in OF_A_LAUNCH if processes > 1)
            for name in OF_A_LAUNCH:
                rank["environment"].pop(name, None)
            file.unlink()
    for warm, executed in zip(found[False], found[True], strict=True):
        for name in warm:
            assert warm[name] == executed[name], name


def test_the_same_run_to_the_bit(tmp_path: Path) -> None:
    """Losses, adapter, optimizer, and the collectives of each phase, which are counted by wrapped functions."""
    runs = [
        launch(CONFIGS / "zero3.yaml", *DEBUG, folder=tmp_path / name, cold=name == "cold") for name in ("warm", "cold")
    ]
    for run in runs:
        assert run.code == 0, run.output
    warm, cold = map(what_stays, runs)
    assert warm == cold
    assert len(warm["metrics"]) == 2


def what_stays(run: Run) -> dict[str, Any]:
    """What a run leaves behind, without its times."""
    usage = json.loads((run.folder / "usage.json").read_text())
    collectives = [
        {phase: cost["collectives"] for phase, cost in rank["phases"].items() if cost["collectives"]}
        for rank in usage["ranks"]
    ]
    metrics = without_clock(run)
    tensors = {
        str(file.relative_to(run.folder)): file.read_bytes() for file in sorted(run.folder.rglob("*.safetensors"))
    }
    return {"metrics": metrics, "collectives": collectives, "tensors": tensors}


def test_failing_ranks_fail_the_launch_with_the_launchers_own_report(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)\n")
    run = launch(CONFIGS / "zero3.yaml", folder=tmp_path / "run", script=script)
    assert run.code == 1
    assert "exitcode  : 7 " in run.output
    assert f"exitcode  : {-signal.SIGTERM} " in run.output, "the launcher ended the other"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-c", "import sys; print(sys.argv[1:], sys.path[0] == ''); sys.exit(3)", "a"], 3, "['a'] True"),
        (["-c", "raise ValueError('wrong')"], 1, "ValueError: wrong"),
        (["-c", "import sys; sys.exit('said')"], 1, "said"),
        (["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], -signal.SIGKILL, ""),
        (["-c", "import atexit; atexit.register(print, 'at the end')"], 0, "at the end"),
        (["-m", "json.tool", "--help"], 0, "usage: "),
        (["-c", "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))))"], 0, "__main__.A"),
    ],
    ids=["code", "exception", "text", "signal", "exit hook", "module", "pickle"],
)
def test_a_command_ends_as_python_ends_it(words: list[str], code: int, said: str, tmp_path: Path) -> None:
    for cold in (False, True):
        run = start([sys.executable, *words], tmp_path, cold=cold)
        assert run.code == code, run.output
        assert said in run.output


def test_nothing_of_this_project_is_imported_beforehand(tmp_path: Path) -> None:
    """And a forked process has one thread and no process group."""
    code = (
        "import os, sys, torch; "
        "own = [n for n in sys.modules if n.split('.')[0] in ('loop', 'eval', 'data', 'benchmarks')]; "
        "print(own, len(os.listdir('/proc/self/task')), torch.distributed.is_initialized(), 'deepspeed' in sys.modules)"
    )
    assert start([sys.executable, "-c", code], tmp_path).output.strip() == "[] 1 False True"


def test_signals_time_outs_and_children(tmp_path: Path) -> None:
    """A warm process is one to kill, to wait for and to find by its parent."""
    log = tmp_path / "log.txt"
    code = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    process = popen([sys.executable, "-c", code], ROOT, clean_environment(), log)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    assert process.poll() is None
    (child,) = children(process.pid)
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM
    os.kill(child, signal.SIGKILL)
