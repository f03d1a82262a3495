"""Starts trainings the way a user does, in real processes, and reads what they leave behind."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accel_configs"
WORKER = ROOT / "tests" / "distributed" / "worker.py"
DEBUG = ("--config", str(ROOT / "loop" / "recipes" / "debug.yaml"))
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


def clean_environment() -> dict[str, str]:
    """Ours, without what a launcher would have set."""
    launchers = ("ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "SWANLAB_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def launch(
    config: Path,
    *arguments: str,
    folder: Path,
    processes: int | None = None,
    precision: str | None = None,
    script: Path = ROOT / "loop" / "train.py",
    env: dict[str, str] | None = None,
    options: Sequence[str] = (),
) -> Run:
    """`accelerate launch --config_file CONFIG script arguments --run_dir folder`, and its outcome."""
    options = ["--config_file", str(config), "--main_process_port", "0", *options]
    options += ["--num_processes", str(processes)] if processes else []
    options += ["--mixed_precision", precision] if precision else []
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, str(script), *arguments]
    return start([*command, "--run_dir", str(folder)], folder, env)


def start(command: list[str], folder: Path, env: dict[str, str] | None = None) -> Run:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment() | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return Run(folder, done.returncode, done.stdout)
