"""Trains one recipe under several accelerate YAMLs, one after the other, and evaluates each of the trainings.

The configurations take turns in two rounds, the second in reverse order, and the report's uncertainty of a step time
includes the difference between the rounds.

python -m eval.stages [--config RECIPE] [--accel YAML …] [-- --epochs 1 …]

Each training is launched as a user would launch it. When one fails, this command records the reason and goes on with
the next. When this command was interrupted, the same command goes on from there.
"""

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from data.errors import UserError
from eval.comparing.accel_files import Configuration
from eval.comparing.comparison import (
    Comparison,
    check_machine,
    check_recipe,
    only_one,
    plan_comparison,
    write_comparison,
)
from eval.comparing.configuration_run import AGAIN, is_done, is_timed_again, result_of, run_one, time_again
from eval.comparing.launch import clean_environment
from eval.comparing.progress import Progress, duration
from eval.monitor import INTERVAL, check_interval
from eval.report import write_comparison_report
from loop.guard.process import RunError, Stopped, exit_codes

TIMEOUT = 4 * 3600.0  # seconds that one training, or one evaluation, may take
SWANLAB_TIMEOUT = 300.0  # seconds that SwanLab may take to record one run
STOPPING = (signal.SIGINT, signal.SIGTERM)


def parse(argv: list[str]) -> tuple[Comparison, bool]:
    """Returns what to compare, and whether the runs that failed are to be run again.

    Raises UserError for options, recipes and YAMLs that cannot be used.
    """
    own, overrides = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="python -m eval.stages",
        description=__doc__,
        epilog="Options after -- override the recipe's values, as they do for loop/train.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="recipe (default loop/recipes/tiny.yaml)")
    parser.add_argument(
        "--accel",
        nargs="+",
        default=[],
        metavar="YAML",
        help="accelerate YAMLs (default: one process, the reference's four, zero2, zero3)",
    )
    parser.add_argument("--out", type=Path, help="folder of the comparison (default runs/stages-<recipe>)")
    parser.add_argument("--interval", type=float, default=INTERVAL, help="seconds between two samples (default 0.5)")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, help="seconds a training or an evaluation may take (default 4 hours)"
    )
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    args = parser.parse_args(own)
    check_interval(args.interval)
    if not 0 < args.timeout < math.inf:
        raise UserError(f"--timeout is {args.timeout:g}, but has to be above 0 seconds.")
    return plan_comparison(args.config, overrides, args.accel, args.out, args.interval, args.timeout), args.retry


def track(comparison: Comparison) -> None:
    """Hands each run that has ended to SwanLab, unless SwanLab has it already."""
    if comparison.recipe.tracker != "swanlab":
        return
    for configuration in comparison.configurations:
        folder = comparison.out / configuration.name
        if not (folder / "result.json").exists() or (folder / "swanlog").exists():
            continue
        command = [sys.executable, "-m", "eval.comparing.swanlab_group", str(folder), *comparison.recipe_argv]
        try:
            subprocess.run(
                command,
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SWANLAB_TIMEOUT,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or "").strip().splitlines()
            print(f"warning: SwanLab did not take {configuration.name}: {said[-1] if said else error}", flush=True)


def conclude(comparison: Comparison) -> None:
    """Hands ended runs to SwanLab and draws the report.

    The command does this after each run, so that a comparison that is killed later has a report too.
    """
    track(comparison)
    try:
        write_comparison_report(comparison.out)
    except Exception as error:  # an error in drawing must not stop the runs that are left
        print(f"warning: no report: {error}", flush=True)


def summarize(comparison: Comparison) -> None:
    """Prints the result of the comparison. Raises RunError when no run has finished."""
    results = [result_of(comparison.out / configuration.name) for configuration in comparison.configurations]
    finished = sum(result["status"] == "finished" for result in results if result)
    if not finished:
        raise RunError(f"none of {len(results)} runs finished; the reasons are above and in {comparison.out}.")
    failed = f", {len(results) - finished} failed (--retry runs them again)" if finished < len(results) else ""
    print(f"{finished} of {len(results)} runs finished{failed}")
    # When there is no report, conclude() has printed a warning.
    with contextlib.suppress(OSError, ValueError, LookupError):
        for finding in json.loads((comparison.out / "summary.json").read_text(encoding="utf-8"))["findings"]:
            print(f"- {finding}")
        print(f"tables: {comparison.out / 'report.md'}\nwith charts: {comparison.out / 'report.html'}")


def run_all(comparison: Comparison, left: list[Configuration], total_steps: int, retry: bool) -> None:
    """Runs the configurations that are `left`, and then times all in reverse order; each training takes `total_steps`
    steps."""
    folders = [comparison.out / configuration.name for configuration in comparison.configurations]
    results = [result for folder in folders if (result := result_of(folder))]
    seconds = [result["wall_seconds"] for result in results if result["status"] == "finished"]
    progress = Progress(total_steps, seconds)
    count = len(comparison.configurations)
    for number, configuration in enumerate(comparison.configurations, start=1):
        if configuration not in left:
            continue
        run = f"run {number} of {count}: {configuration.name}"
        progress.begin(run, len(left) - left.index(configuration) - 1 + count)
        begun = time.monotonic()
        result = run_one(comparison, configuration, progress)
        if result["status"] == "finished":
            seconds.append(time.monotonic() - begun)
        _say(comparison.out / configuration.name, run, result, progress)
        conclude(comparison)
    for number, configuration in reversed(list(enumerate(comparison.configurations, start=1))):
        folder = comparison.out / configuration.name
        if is_timed_again(folder, retry):
            continue
        run = f"second round, run {number} of {count}: {configuration.name}"
        progress.begin(run, number - 1)
        _say(folder / AGAIN, run, time_again(comparison, configuration, progress), progress)
        conclude(comparison)


def _say(folder: Path, run: str, result: Mapping[str, Any], progress: Progress) -> None:
    if result["status"] == "finished":
        progress.say(f"{run}: finished, {duration(result['wall_seconds'])} of training")
    else:
        progress.say(f"{run}: {result['status']}: {result['reason']} (log: {folder / 'log.txt'})")


@contextmanager
def stoppable(comparison: Comparison) -> Iterator[None]:
    """Raises Stopped at the first SIGINT or SIGTERM and ignores later ones, which would disturb the cleaning up."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        folders = [comparison.out / configuration.name for configuration in comparison.configurations]
        ended = sum((folder / "result.json").exists() for folder in folders)
        raise Stopped(
            number, f"\nstopped: {ended} of {len(folders)} runs are done and stay; the same command does the rest"
        )

    before = {each: signal.signal(each, stop) for each in STOPPING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@exit_codes()
def main(argv: list[str]) -> None:
    comparison, retry = parse(argv)
    left = [each for each in comparison.configurations if not is_done(comparison.out / each.name, retry)]
    work = left or not all(is_timed_again(comparison.out / each.name, retry) for each in comparison.configurations)
    with stoppable(comparison):
        here = check_machine(comparison) if work else {}
        total_steps = check_recipe(comparison) if work else 0
        with only_one(comparison), one_error(comparison):
            if work:
                write_comparison(comparison, here)
                run_all(comparison, left, total_steps, retry)
            else:
                conclude(comparison)
        summarize(comparison)


@contextmanager
def one_error(comparison: Comparison) -> Iterator[None]:
    """Turns an OSError into a RunError: the disk is full, for example, or the folder is gone.

    The runs that have ended stay. The other runs are not tried, because they would fail as well.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or comparison.out}: {error.strerror}. Runs that are done stay. Free space there or make "
            "it writable; then the same command does the rest."
        ) from error


if __name__ == "__main__":
    main(sys.argv[1:])
