"""Runs one configuration of a comparison: launches, samples and evaluates it, and writes its result.json.

Each configuration is trained twice, in two rounds (A B C, then C B A), so that a machine that becomes slower or faster
does not look like a difference between configurations. The second training is for its times alone.
"""

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from data.errors import user_error
from eval.comparing.accel_files import Configuration
from eval.comparing.comparison import Comparison, write_whole
from eval.comparing.launch import accelerate_command, end_processes, failure_reason, read_from, run_command
from eval.comparing.progress import Progress
from eval.monitor import Monitor, Sampling
from loop.recipe import ROOT

TRAIN = ROOT / "loop" / "train.py"
NOT_SAMPLED = Sampling(0, 0.0, 0.0)
AGAIN = "again"  # in the folder of a configuration: what the second round leaves


def result_of(folder: Path) -> dict[str, Any] | None:
    """Returns result.json, or None until this configuration is done. Raises UserError for a damaged file."""
    file = folder / "result.json"
    with user_error(f"{file}: cannot be read", "Remove it, and this configuration is run again."):
        try:
            result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        float(result["wall_seconds"]), str(result["status"])
    return result


def is_done(folder: Path, retry: bool) -> bool:
    """Says whether this configuration is left out now: it has finished, or it has failed and `retry` is false."""
    result = result_of(folder)
    return result is not None and (result["status"] == "finished" or not retry)


def training_command(comparison: Comparison, configuration: Configuration, run: Path) -> list[str]:
    """Returns the command that a user would type, with a free port.

    The command sets grad_accum_steps so that all configurations learn from the same effective batch.
    """
    command = [*accelerate_command(configuration.file), str(TRAIN), *comparison.recipe_argv]
    accumulated = comparison.grad_accum_steps(configuration)
    if accumulated != comparison.recipe.grad_accum_steps:
        command += ["--grad_accum_steps", str(accumulated)]
    return [*command, "--run_dir", str(run), "--tracker", "null"]


def is_timed_again(folder: Path, retry: bool) -> bool:
    """Says whether the second round leaves this configuration out: it is done, or the first training has failed."""
    first = result_of(folder)
    return (first is not None and first["status"] != "finished") or is_done(folder / AGAIN, retry)


def train(comparison: Comparison, configuration: Configuration, folder: Path, progress: Progress) -> dict[str, Any]:
    """Runs the training in `folder` and returns what result.json says about it."""
    log = folder / "log.txt"
    monitor: Monitor | None = None
    begun = time.monotonic()

    def meanwhile(pid: int) -> None:
        nonlocal monitor
        if monitor is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                monitor = sampling.enter_context(
                    Monitor(pid, folder / "samples.csv", comparison.interval, configuration.num_processes)
                )
        progress.training(folder / "run" / "metrics.jsonl")

    with contextlib.ExitStack() as sampling:
        command = training_command(comparison, configuration, folder / "run")
        mark = str((comparison.out / configuration.name).resolve())
        code = run_command(command, log, mark, comparison.timeout, meanwhile)
    wall_seconds = time.monotonic() - begun
    status, reason = outcome(code, log, 0, comparison.timeout)
    return {
        "name": configuration.name,
        "accel_config": configuration.file,
        "status": status,
        "reason": reason,
        "wall_seconds": round(wall_seconds, 3),
        "num_processes": configuration.num_processes,
        "micro_batch_size": comparison.recipe.micro_batch_size,
        "grad_accum_steps": comparison.grad_accum_steps(configuration),
        "sampling": vars(monitor.cost if monitor else NOT_SAMPLED),
    }


def outcome(code: int | None, log: Path, offset: int, timeout: float) -> tuple[str, str | None]:
    """Returns status and reason of a command that has ended with `code`; its output is in `log` from `offset` on."""
    if code is None:
        return "timed out", f"time-out after {timeout:g} s"
    return ("finished", None) if code == 0 else ("failed", failure_reason(read_from(log, offset), code))


def evaluate(comparison: Comparison, configuration: Configuration, progress: Progress) -> tuple[str, str | None]:
    """Evaluates the training and returns status and reason.

    The base model is the same for all configurations, so only the first evaluation of the comparison asks it.
    """
    folder = comparison.out / configuration.name
    command = [sys.executable, "-m", "eval.run", "--run", str(folder / "run")]
    (folder / "run" / "eval.json").unlink(missing_ok=True)  # an evaluation that was killed may have left this file
    if any(base_was_asked(other) for other in comparison.out.glob("*/run/eval.json")):
        command.append("--adapter-only")
    log = folder / "log.txt"
    offset = log.stat().st_size
    mark = str(folder.resolve())
    code = run_command(command, log, mark, comparison.timeout, lambda pid: progress.evaluating())
    status, reason = outcome(code, log, offset, comparison.timeout)
    return status, f"evaluation: {reason}" if reason else None


def base_was_asked(file: Path) -> bool:
    """Says whether this eval.json has the scores of the base model."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return "base" in content.get("scores", content)  # an older file has only the scores
    except ValueError:
        return False


def run_one(comparison: Comparison, configuration: Configuration, progress: Progress) -> dict[str, Any]:
    """Trains and evaluates one configuration; result.json is written last.

    A training that was done before an interruption is not repeated.
    """
    folder = comparison.out / configuration.name
    trained, done = folder / "training.json", folder / "result.json"
    end_processes(str(folder.resolve()))  # a comparison that was killed a moment ago may have left processes
    if trained.exists():
        done.unlink(missing_ok=True)
        shutil.rmtree(folder / "swanlog", ignore_errors=True)  # SwanLab has recorded that this configuration failed
        result = json.loads(trained.read_text(encoding="utf-8"))
    else:  # a half-done training starts again, because its times would not be comparable
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        result = train(comparison, configuration, folder, progress)
        if result["status"] == "finished":
            write_whole(trained, result)
    if result["status"] == "finished":
        result["status"], result["reason"] = evaluate(comparison, configuration, progress)
    write_whole(done, result)
    if result["status"] == "finished":
        trained.unlink(missing_ok=True)
    return dict(result)


def time_again(comparison: Comparison, configuration: Configuration, progress: Progress) -> dict[str, Any]:
    """Trains a configuration in the second round and keeps the times: usage.json, and result.json, written last."""
    folder = comparison.out / configuration.name / AGAIN
    end_processes(str((comparison.out / configuration.name).resolve()))
    if folder.exists():  # half-done, or failed
        shutil.rmtree(folder)
    folder.mkdir()
    result = train(comparison, configuration, folder, progress)
    if result["status"] == "finished":
        (folder / "run" / "usage.json").rename(folder / "usage.json")
        shutil.rmtree(folder / "run")
    write_whole(folder / "result.json", result)
    return result
