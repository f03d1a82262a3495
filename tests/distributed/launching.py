"""Starts trainings the way a user does, in real processes, and reads what they leave behind."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

from benchmarks.launching import launch_command
from tests.warm import clean_environment, cold_popen, popen

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accel_configs"
TRAIN = ROOT / "loop" / "train.py"
WORKER = ROOT / "tests" / "distributed" / "worker.py"
DEBUG = ("--config", str(ROOT / "loop" / "recipes" / "debug.yaml"))
ENDLESS = ("--epochs", "10000", "--save_every", "1000", "--rank_timeout", "5")
# Where DeepSpeed's extensions are built, for runs whose HOME is another one; without it they would be built anew.
EXTENSIONS = str(Path(_get_build_directory("cpu_adam", verbose=False)).parent)
BOUND = 25  # seconds from a signal to the end of all processes
TIMEOUT = 600  # seconds; only so that a hang fails


@dataclass(frozen=True)
class Run:
    folder: Path
    code: int
    output: str  # stdout and stderr

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def series(self, key: str) -> list[float]:
        return [line[key] for line in self.metrics if key in line]


def launch(
    config: Path,
    *arguments: str,
    folder: Path,
    processes: int | None = None,
    precision: str | None = None,
    script: Path = TRAIN,
    env: dict[str, str] | None = None,
    options: Sequence[str] = (),
    cold: bool = False,
) -> Run:
    """`accelerate launch --config_file CONFIG script arguments --run_dir folder`, and its outcome."""
    command = [*launch_command(config), *options]
    command += ["--num_processes", str(processes)] if processes else []
    command += ["--mixed_precision", precision] if precision else []
    return start([*command, str(script), *arguments, "--run_dir", str(folder)], folder, env, cold)


def start(
    command: list[str], folder: Path, env: dict[str, str] | None = None, cold: bool = False, cwd: Path = ROOT
) -> Run:
    """Runs `command` in the folder `cwd` to its end.

    A Python command runs in a warm process (tests/warm.py), unless it has to be `cold`.
    """
    environment = clean_environment() | (env or {})
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "output.txt"
        process = (cold_popen if cold else popen)(command, cwd, environment, output)
        try:
            code = process.wait(timeout=TIMEOUT)
        finally:
            process.kill()
        return Run(folder, code, output.read_text(encoding="utf-8", errors="replace"))


def without_clock(run: Run) -> list[dict[str, float]]:
    """The run's metrics without what depends on the time or on the memory of a process."""
    other = ("train/tokens_per_second", "train/peak_bytes")
    return [{key: value for key, value in line.items() if key not in other} for line in run.metrics]


def children(pid: int) -> list[int]:
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


def last_step(folder: Path) -> int:
    """The last step that a whole line of metrics.jsonl tells; 0 where there is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return max((int(json.loads(line)["step"]) for line in lines if line.endswith("\n")), default=0)


class Running:
    """A training that goes on until it is stopped."""

    def __init__(
        self,
        folder: Path,
        launcher: bool,
        *arguments: str,
        script: Path = TRAIN,
        until: Callable[[], bool] | None = None,
        cold: bool = False,
    ) -> None:
        self.folder, self.log = folder, folder.with_suffix(".txt")
        command = launch_command(CONFIGS / "zero3.yaml") if launcher else [sys.executable]
        command += [str(script), *DEBUG, *ENDLESS, *arguments, "--run_dir", str(folder)]
        self.process = (cold_popen if cold else popen)(command, ROOT, clean_environment(), self.log)
        self.wait_until(until or (lambda: last_step(folder) >= 5))
        self.ranks = children(self.process.pid) if launcher else [self.process.pid]

    def wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()  # which its ranks notice
                raise AssertionError(self.log.read_text())
            time.sleep(0.1)

    def wait(self) -> str:
        """The output, once every process is gone."""
        deadline = time.monotonic() + BOUND
        try:
            self.process.wait(timeout=BOUND)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        while any(Path(f"/proc/{pid}").exists() for pid in self.ranks):
            assert time.monotonic() < deadline, "a process stayed behind"
            time.sleep(0.1)
        return self.log.read_text()
