"""Prints a line that says which run of a comparison is at which step, and how long the rest may take."""

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

EVERY = 10.0  # seconds between two lines when the output is not a terminal
TAIL = 4096  # bytes to read at the end of metrics.jsonl; its last line is shorter


class Progress:
    """Prints the state of a comparison. In a terminal, each line replaces the line before."""

    def __init__(self, total_steps: int, seconds_of_runs: list[float]) -> None:
        self.total_steps = total_steps
        self.seconds_of_runs = seconds_of_runs  # durations of the runs that have ended
        self.terminal = sys.stdout.isatty()
        self.shown = -EVERY
        self.begin("", 0)

    def begin(self, run: str, runs_after: int) -> None:
        """Begins a run, which the line calls `run`, for example "run 3 of 7: zero3". `runs_after` others follow."""
        self.run, self.runs_after = run, runs_after
        self.begun = time.monotonic()
        self.first: tuple[int, float] | None = None  # the first step that was seen, and the time
        self.last = (0, self.begun)

    def training(self, metrics: Path) -> None:
        """Says how far the training is whose metrics.jsonl is `metrics`."""
        step, now = last_step(metrics), time.monotonic()
        if step > self.last[0]:
            self.first = self.first or (step, now)
            self.last = (step, now)
        at = f"training, step {step}/{self.total_steps}" if step else "starting"
        self._show(f"{at}, {self._left(now)}", now)

    def evaluating(self) -> None:
        """Says that the run is being evaluated."""
        now = time.monotonic()
        whole = statistics.mean(self.seconds_of_runs) if self.seconds_of_runs else now - self.begun
        left = f", about {duration(self.runs_after * whole)} left after that" if self.runs_after else ""
        self._show(f"evaluating{left}", now)

    def say(self, line: str) -> None:
        """Prints a line that the next line does not replace."""
        print(f"\r\033[K{line}" if self.terminal else line, flush=True)

    def _left(self, now: float) -> str:
        """Says how long this run and the runs after it may take.

        The rest of this run follows from its step rate. The runs after it are taken to be as long as the runs that have
        ended or, when none has ended, as this run.
        """
        step, when = self.last
        first_step, first_when = self.first or self.last
        this = None
        if step > first_step:
            this = (self.total_steps - step) * (when - first_when) / (step - first_step) - (now - when)
        whole = statistics.mean(self.seconds_of_runs) if self.seconds_of_runs else None
        if whole is None and this is not None:
            whole = now - self.begun + this
        if this is None and whole is not None:
            this = whole - (now - self.begun)
        if this is None or whole is None:
            return "time left not known yet"
        return f"about {duration(max(this, 0.0) + self.runs_after * whole)} left"

    def _show(self, what: str, now: float) -> None:
        """Prints the line that replaces the one before; without a terminal, only once in EVERY seconds."""
        if self.terminal:
            line = f"{self.run}, {what}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{line}", end="", flush=True)
        elif now - self.shown >= EVERY:
            self.shown = now
            print(f"{self.run}, {what}", flush=True)


def duration(seconds: float) -> str:
    """Returns the duration in a unit that suits it, for example "5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def last_step(metrics: Path) -> int:
    """Returns the step of the last whole line of a metrics.jsonl, or 0 when there is no whole line."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return 0
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0
