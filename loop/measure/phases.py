"""Measures what a run costs, on every rank: seconds, peak memory and collectives of each phase.

Every process has one account, which is open from the first import on and always in one phase. `measured` marks the
phases where the code of each stands: those of a step in loop/step.py, loading, validating and saving at the functions
that do it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from data.batch import Window
from loop.measure.flops import Batch, count
from loop.measure.memory import peak_memory
from loop.measure.phase_names import STEP_PHASES, Phase

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("broadcast", "reduce", "gather", "scatter", "all_to_all", "all_to_all_single"),
)


@dataclass
class Traffic:
    """The collectives of one kind in one phase."""

    count: int = 0
    bytes: int = 0  # of the whole tensors: the output of an all_gather, the input of a reduce_scatter


@dataclass
class Cost:
    """The cost of one phase, over the whole run."""

    seconds: float = 0.0  # measured by the GPU itself where there is one
    count: int = 0
    peak_bytes: int | None = None  # None where the system does not tell
    collectives: dict[str, Traffic] = field(default_factory=dict)


class Account:
    """The costs of this process so far."""

    def __init__(self) -> None:
        self.costs: dict[Phase, Cost] = {}
        self.phase: Phase = "start"
        self.begun = perf_counter()
        self.step_seconds: list[float] = []  # seconds of each step on the host: data, forward, backward and update
        self.this_step = 0.0
        self.batch = Batch()  # this rank's rows of all steps
        self.whole = False  # True while a phase lets no other phase begin inside it
        self.mark: Any = None  # the event on the GPU's stream with which the phase began
        self.marks: list[tuple[Phase, Any, Any]] = []  # phases that the GPU may not have finished yet

    def enter(self, phase: Phase) -> Phase:
        """Ends the phase under way, which is returned, and begins another. Does not wait for a GPU."""
        if self.whole:
            return self.phase
        before, now = self.phase, perf_counter()
        cost = self.cost()
        mark = None
        if torch.cuda.is_initialized():
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        if mark is None or self.mark is None:
            cost.seconds += now - self.begun
        else:
            self.marks.append((before, self.mark, mark))
        self.mark = mark
        cost.count += phase != before
        cost.peak_bytes = _larger(cost.peak_bytes, peak_memory())
        if before in STEP_PHASES:
            self.this_step += now - self.begun
        self.phase, self.begun = phase, now
        return before

    def cost(self) -> Cost:
        """The cost of the phase under way."""
        return self.costs.setdefault(self.phase, Cost())

    @property
    def peak_bytes(self) -> int | None:
        """The peak memory of this process in all phases that have ended; None where the system does not tell."""
        return max((cost.peak_bytes for cost in self.costs.values() if cost.peak_bytes is not None), default=None)

    def settle(self, wait: bool = False) -> None:
        """Adds the seconds that the GPU has measured so far to the costs; with `wait` those of all phases."""
        under_way = []
        for phase, start, end in self.marks:
            if wait:
                end.synchronize()
            if end.query():
                self.costs[phase].seconds += start.elapsed_time(end) / 1000
            else:
                under_way.append((phase, start, end))
        self.marks = under_way

    def steps(self, windows: Iterable[Window]) -> Iterator[Window]:
        """Yields the windows; what happens until the next one is one step. Making a window counts as data."""
        source = iter(windows)
        self.this_step = 0.0
        while True:
            with measured("data"):
                window = next(source, None)
            if window is None:
                return
            yield window
            self.settle()
            self.step_seconds.append(self.this_step)
            self.this_step = 0.0
            self.batch = sum(map(count, window.micro_batches), self.batch)


ACCOUNT = Account()


class measured(ContextDecorator):
    """Makes a block, or a function, a phase of its own; afterwards the phase around it goes on.

    A `whole` phase lets no other phase begin inside it: resuming takes a step, which is none of the run's steps.
    """

    def __init__(self, phase: Phase, whole: bool = False) -> None:
        self.phase, self.whole = phase, whole

    def _recreate_cm(self) -> "measured":
        return measured(self.phase, self.whole)  # a decorated function may be entered twice

    def __enter__(self) -> None:
        self.before = ACCOUNT.enter(self.phase)
        self.outside = ACCOUNT.whole
        ACCOUNT.whole = self.whole or self.outside

    def __exit__(self, *problem: object) -> None:
        ACCOUNT.whole = self.outside
        ACCOUNT.enter("other" if self.before == "start" else self.before)


@functools.cache  # a second call changes nothing
def count_collectives() -> None:
    """Counts the collectives of torch.distributed from now on, by patching the functions that COLLECTIVES names.

    Call it before DeepSpeed starts, because DeepSpeed keeps references to these functions. Written against torch 2.13.
    No public way does the same: DeepSpeed's communication logger makes every collective a blocking one, and a profiler
    slows every operation of a step. DDP's collectives are called in C++ and are not seen.

    The counting is on in every run, because usage.json of every run, the report and the comparison of stages show its
    figures, and a run that is measured should be the run that is done. It costs three microseconds a collective; the
    smallest collective of a single process takes fifteen (gloo, 2026).
    """
    within = False  # True inside a counted collective: another one that it calls is not counted again

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        kind = name.removesuffix("_tensor").removesuffix("_into").removesuffix("_single")

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal within
            if within:
                return function(*args, **kwargs)
            traffic = ACCOUNT.cost().collectives.setdefault(kind, Traffic())
            traffic.count += 1
            traffic.bytes += _largest([*args, *kwargs.values()])
            within = True
            try:
                return function(*args, **kwargs)
            finally:
                within = False

        return wrapper

    c10d = torch.distributed.distributed_c10d
    for name in COLLECTIVES:
        wrapper = counted(name, getattr(c10d, name))
        setattr(c10d, name, wrapper)
        setattr(torch.distributed, name, wrapper)


def _largest(arguments: Iterable[Any]) -> int:
    """Bytes of the largest tensor, or list of tensors, in a collective's arguments: the whole that it works on."""
    sizes = [0]
    for argument in arguments:
        tensors = argument if isinstance(argument, list | tuple) else [argument]
        sizes.append(sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)))
    return max(sizes)


def _larger(one: int | None, other: int | None) -> int | None:
    return max(one, other) if one is not None and other is not None else one or other
