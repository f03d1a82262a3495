"""Launches a training for a benchmark: a real `accelerate launch`, in an environment that no launcher has touched."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.comparing.launch import accelerate_command, clean_environment
from loop.recipe import ROOT

CONFIGS = ROOT / "accel_configs"
LIGHT = ("accelerate.commands.launch",)  # this module imports none of accelerate's other commands
TIMEOUT = 600.0  # seconds; a training that takes longer hangs


@dataclass(frozen=True)
class Finished:
    """Holds the exit code of a command that has ended, and what the command wrote to stdout and stderr."""

    code: int
    output: str


def launch_command(config: Path) -> list[str]:
    """Returns the command that launches as `accelerate launch` does, and that starts faster; a script has to follow."""
    return accelerate_command(config, LIGHT)


def run_to_end(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Finished:
    """Runs `command` in the project's folder until it ends, with one thread a process, and captures what it writes.

    The command gets no settings of SwanLab, so that a benchmark sends nothing to the user's account. `environment` is
    added to the variables that the command gets.
    """
    kept = {key: value for key, value in clean_environment().items() if not key.startswith("SWANLAB_")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=kept | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return Finished(done.returncode, done.stdout)
