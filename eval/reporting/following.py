"""Follows a run while it trains, from metrics.jsonl and recipe.yaml alone: nothing here writes, or asks the run."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from eval.reporting.first_screen import duration

MOST_STEPS = 10**9
OBSERVATIONS = 20  # number of growths of the file from which the time that is left follows

Line = dict[str, Any]


def total_steps(recipe: Mapping[str, Any], logged: Sequence[tuple[int, float]]) -> int | None:
    """Returns the number of steps of the run, where the last two of the logged steps and learning rates agree on it.

    A single learning rate of the warm-up may also belong to the fall of a shorter run.
    """
    found = {_steps_by(recipe, step, lr) for step, lr in logged[-2:]}
    return found.pop() if len(logged) > 1 and len(found) == 1 else None


def _steps_by(recipe: Mapping[str, Any], step: int, lr: float) -> int | None:
    """Returns the number of steps of the run to which a learning rate belongs, if it lies after the warm-up.

    The learning rate rises in a line and falls along half a cosine to 0 at the last step (build_lr_scheduler), so
    after the warm-up it belongs to one number of steps only. The step that is logged as `step` used the schedule's
    place step - 1.
    """
    optim = recipe.get("optim", {})
    peak, ratio = optim.get("lr"), optim.get("warmup_ratio")
    if not isinstance(peak, int | float) or not isinstance(ratio, int | float) or not 0 < lr < peak:
        return None

    def warmup_steps(total: int) -> int:
        return math.ceil(ratio * total)  # as in loop/batch_arithmetic.py, which imports torch

    def expected(total: int) -> float:
        warmup = warmup_steps(total)
        if step - 1 < warmup:
            return peak * (step - 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / (total - warmup)))

    # Of the numbers of steps whose warm-up is over at this step, a larger one has a larger learning rate here.
    low, high = step, min(MOST_STEPS, int((step - 1) / ratio) if ratio else MOST_STEPS)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if expected(middle) < lr else (low, middle)
    near = [total for total in (low - 1, low, low + 1) if total >= step and warmup_steps(total) < total]
    best = min(near, key=lambda total: abs(expected(total) - lr), default=None)
    if best is None or step - 1 < warmup_steps(best) or abs(expected(best) - lr) > 1e-9 * peak:
        return None
    return best


class Follower:
    """Reads what was added to metrics.jsonl since it was last asked.

    `clock` returns seconds. A file that was replaced or became shorter, as by a run that is resumed, is read anew, and
    `generation` counts how often this has happened.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder, self.clock = folder, clock
        self.generation = 0
        self.file: int | None = None  # the inode of the file that was read
        self._forget()

    def _forget(self) -> None:
        self.lines: list[Line] = []
        self.damaged = 0  # number of lines that are no JSON object with a step
        self.place, self.rest = 0, b""  # number of bytes read, and the half line at their end
        self.seen: list[tuple[float, int]] = []  # when the file had grown, and the step that it had reached by then

    def poll(self) -> None:
        """Reads what is new. A file that is not there yet counts as empty."""
        try:
            with (self.folder / "metrics.jsonl").open("rb") as file:
                status = os.fstat(file.fileno())
                if self.file not in (None, status.st_ino) or status.st_size < self.place:
                    self._forget()
                    self.generation += 1
                self.file = status.st_ino
                file.seek(self.place)
                data = file.read()
        except OSError:
            if self.file is not None:
                self._forget()
                self.file = None
                self.generation += 1
            return
        self.place += len(data)
        *whole, self.rest = (self.rest + data).split(b"\n")
        before = len(self.lines)
        for line in whole:
            self._add(line)
        if len(self.lines) > before:
            self.seen.append((status.st_mtime, int(self.lines[-1]["step"])))
            del self.seen[:-OBSERVATIONS]

    def _add(self, text: bytes) -> None:
        try:
            line = json.loads(text, parse_constant=lambda _: None)  # a browser reads no NaN
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self.damaged += 1
        else:
            self.lines.append(line)

    def recipe(self) -> dict[str, Any]:
        """Returns recipe.yaml, or nothing where it is not there or not readable yet."""
        with suppress(OSError, ValueError, yaml.YAMLError):
            recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
            return recipe if isinstance(recipe, dict) else {}
        return {}

    def seconds_left(self, total: int | None) -> float | None:
        """Returns the seconds until the last step by the growth of the file, or None where that is not known yet."""
        if total is None or len(self.seen) < 2:
            return None
        (begun, first), (now, last) = self.seen[0], self.seen[-1]
        if last <= first or now <= begun:
            return None
        return max(0.0, (total - last) * (now - begun) / (last - first) - (self.clock() - now))

    def total(self) -> int | None:
        """Returns the number of steps of the run, where the last lines tell it."""
        rates = [(line["step"], lr) for line in self.lines[-OBSERVATIONS:] if (lr := line.get("train/lr")) is not None]
        return total_steps(self.recipe(), [(step, lr) for step, lr in rates if isinstance(lr, int | float)])

    def told(self, since: int = 0, generation: int | None = None) -> dict[str, Any]:
        """Returns what the page shows, with the lines from number `since` on, or all when the file is another one."""
        since = since if generation == self.generation else 0
        return {
            "generation": self.generation,
            "since": since,
            "lines": self.lines[since:],
            "facts": self.facts() if self.lines else {},
            "status": self.status(),
        }

    def status(self) -> str:
        if not self.folder.is_dir():
            return f"waiting: there is no folder {self.folder} yet"
        if not self.lines:
            return "waiting: metrics.jsonl has no line yet"
        ago = duration(max(0.0, self.clock() - self.seen[-1][0]))
        damaged = f"; {self.damaged} lines cannot be read" if self.damaged else ""
        return f"the last line was written {ago} ago{damaged}"

    def facts(self) -> dict[str, str]:
        """Returns the facts that stand on top of the page."""
        last, total = self.lines[-1], self.total()
        step = last["step"]
        left = self.seconds_left(total)
        if total is not None and step >= total:
            time_left = "none: the last step is done"
        else:
            time_left = "not known yet" if left is None else f"about {duration(left)}"
        return {
            "step": f"{step:,} of {total:,}" if total else f"{step:,}, of how many is known after the warm-up",
            "time left": time_left,
            "training loss": self._latest("train/loss"),
            "last validation": self._latest("val/loss"),
            "tokens a second": self._latest("train/tokens_per_second"),
            "memory": self._memory(),
        }

    def _latest(self, key: str) -> str:
        for line in reversed(self.lines):
            if key in line:
                value = line[key]
                return f"{value:,.5g} (step {line['step']:,})" if isinstance(value, int | float) else "not finite"
        return "none yet"

    def _memory(self) -> str:
        peaks = [size for line in self.lines if isinstance(size := line.get("train/peak_bytes"), int | float)]
        return f"peak of rank 0: {peaks[-1] / 1e6:,.0f} MB" if peaks else "not known"
