"""The batch's arithmetic, in one place: rows of a step, steps of an epoch, steps of the run, steps of warm-up."""

import math
import os
from dataclasses import dataclass, replace

from data.batch import num_windows
from data.errors import UserError
from loop.recipe import MOST, Recipe


@dataclass(frozen=True)
class BatchArithmetic:
    """How the training rows become steps. Train, the first page, resume and the planner read their numbers here."""

    micro_batch_size: int  # rows that a process computes at once
    grad_accum_steps: int  # micro-batches that a process adds up before an optimizer step
    num_processes: int
    num_rows: int  # training rows
    epochs: int
    max_steps: int | None  # after which the run ends, if its epochs have more
    warmup_ratio: float

    @classmethod
    def of(cls, recipe: Recipe, num_processes: int, num_rows: int) -> "BatchArithmetic":
        """The arithmetic of `recipe` on so many processes. Raises UserError where they cannot share rows_per_step."""
        recipe = in_numbers(settle_accumulation(recipe, num_processes), num_processes)
        return cls(
            micro_batch_size=recipe.rows_at_once,
            grad_accum_steps=recipe.grad_accum_steps,
            num_processes=num_processes,
            num_rows=num_rows,
            epochs=recipe.epochs,
            max_steps=recipe.max_steps,
            warmup_ratio=recipe.optim.warmup_ratio,
        )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of a step, over all processes."""
        return self.grad_accum_steps * self.num_processes

    @property
    def rows_per_step(self) -> int:
        """The effective batch: rows of a step, over all processes."""
        return self.micro_batch_size * self.micro_batches_per_step

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; a last window that is not full is a step too."""
        return num_windows(self.num_rows, self.rows_per_step)

    @property
    def total_steps(self) -> int:
        """Steps of the run, over which the learning rate rises and falls."""
        return num_steps(self.steps_per_epoch, self.epochs, self.max_steps)

    @property
    def length(self) -> str:
        """What the recipe says about the number of steps, in words."""
        return f"{self.epochs} epochs" + ("" if self.max_steps is None else f" (max_steps {self.max_steps})")

    @property
    def cut_short(self) -> bool:
        """Whether max_steps ends the run before its epochs are over."""
        return self.total_steps < self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return warmup_steps(self.warmup_ratio, self.total_steps)

    def check_schedule(self) -> None:
        """Raises UserError where every step is warm-up. The learning rate of the first step is 0, and it would never
        reach its peak; a run of one such step learns nothing at all."""
        total = self.total_steps
        if self.warmup_steps < total:
            return
        enough = next((t for t in range(total + 1, MOST) if warmup_steps(self.warmup_ratio, t) < t), None)
        longer = f"{self._longer(enough)}, or " if enough else ""
        raise UserError(
            f"optim.warmup_ratio is {self.warmup_ratio:g}: {self.warmup_steps} of the {total} steps would be warm-up, "
            f"which begins at learning rate 0, so that the run would not reach optim.lr. ({self.num_rows:,} rows, "
            f"{self.rows_per_step:,} rows a step, {self.length}.) Give {longer}a smaller --optim.warmup_ratio; "
            "0 is no warm-up."
        )

    def _longer(self, steps: int) -> str:
        """The options that make a run of at least so many steps."""
        epochs = max(self.epochs, math.ceil(steps / self.steps_per_epoch))
        options = [f"--epochs {epochs}"] if epochs > self.epochs else []
        if self.max_steps is not None and self.max_steps < steps:
            return " ".join([*options, f"--max_steps {steps}"])
        return f"{options[0]}, fewer rows a step"


def num_steps(steps_per_epoch: int, epochs: int, max_steps: int | None) -> int:
    """Steps of a run: all its epochs, or max_steps where that is less."""
    steps = steps_per_epoch * epochs
    return steps if max_steps is None else min(steps, max_steps)


def warmup_steps(warmup_ratio: float, total_steps: int) -> int:
    """Steps in which the learning rate rises."""
    return math.ceil(warmup_ratio * total_steps)


def num_launched() -> int:
    """Processes that the launcher has started, this one included; known before they have found each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def settle_accumulation(recipe: Recipe, num_processes: int) -> Recipe:
    """The recipe with the grad_accum_steps that make rows_per_step on so many processes.

    A recipe without rows_per_step, or with the micro_batch_size auto, stays as it is. Raises UserError, with both
    numbers and the fix, where the processes cannot share the rows, or where grad_accum_steps is given as well and makes
    another number of rows.
    """
    rows = recipe.rows_per_step
    if rows is None:
        return recipe
    auto = recipe.micro_batch_size == "auto"
    micro, accumulation = 1 if auto else recipe.rows_at_once, recipe.grad_accum_steps
    at_once = micro * num_processes
    if rows % at_once:
        found = cut_up(rows, num_processes, micro)
        fix = f"Set --micro_batch_size {found[0]}" if found else f"Launch a number of processes that divides {rows}"
        if auto:
            raise UserError(f"rows_per_step is {rows}, which {num_processes} processes cannot share. {fix}.")
        raise UserError(
            f"rows_per_step is {rows}, but micro_batch_size {micro} x {num_processes} processes = {at_once} rows, "
            f"which does not divide it. {fix}, or give another rows_per_step."
        )
    if auto:
        return recipe
    if accumulation not in (1, rows // at_once):
        raise UserError(
            f"rows_per_step is {rows}, but micro_batch_size {micro} x grad_accum_steps {accumulation} x "
            f"{num_processes} processes = {at_once * accumulation} rows. Leave grad_accum_steps out, or set "
            f"--rows_per_step {at_once * accumulation}."
        )
    return replace(recipe, grad_accum_steps=rows // at_once)


def in_numbers(recipe: Recipe, num_processes: int) -> Recipe:
    """The recipe with a process's whole share in place of the micro_batch_size auto, until that is decided."""
    if recipe.micro_batch_size != "auto":
        return recipe
    assert recipe.rows_per_step is not None
    return replace(recipe, micro_batch_size=recipe.rows_per_step // num_processes, grad_accum_steps=1)


def cut_up(rows: int, num_processes: int, at_most: int) -> tuple[int, int] | None:
    """A micro_batch_size of `at_most` rows and the grad_accum_steps with which the processes share `rows` rows.

    None where the number of processes does not divide the rows.
    """
    if rows % num_processes:
        return None
    each = rows // num_processes
    micro = max(size for size in range(1, min(at_most, each) + 1) if each % size == 0)
    return micro, each // micro
