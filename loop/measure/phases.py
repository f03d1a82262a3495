"""What a run costs, measured from inside on every rank: seconds, peak memory and collectives of each phase.

One account a process, open from the first import on, always in one phase. Loading, saving and validating are marked
where they are written (`measured`); forward, backward and update by a wrapper around what the engine does in a step
(`watch_phases`), so that loop/step.py stays what it is.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ContextDecorator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from data.batch import Window
from loop.measure.flops import Batch, count

Phase = Literal["start", "load", "data", "forward", "backward", "update", "validate", "save", "other"]
STEP: tuple[Phase, ...] = ("data", "forward", "backward", "update")
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("broadcast", "reduce", "gather", "scatter", "all_to_all", "all_to_all_single"),
)


@dataclass
class Traffic:
    count: int = 0
    bytes: int = 0  # of whole tensors: what an all_gather gives, what a reduce_scatter takes


@dataclass
class Cost:
    """Of one phase, over the whole run."""

    seconds: float = 0.0  # the device's own, where it is a GPU
    count: int = 0
    peak_bytes: int | None = None  # None where the system does not tell
    collectives: dict[str, Traffic] = field(default_factory=dict)


class Account:
    """The costs of this process so far."""

    def __init__(self) -> None:
        self.costs: dict[Phase, Cost] = {}
        self.phase: Phase = "start"
        self.begun = perf_counter()
        self.step_seconds: list[float] = []  # of the host: data, forward, backward and update
        self.this_step = 0.0
        self.batch = Batch()  # this rank's rows of all steps
        self.mark: Any = None  # on the GPU's stream, where the phase began
        self.marks: list[tuple[Phase, Any, Any]] = []  # phases that the GPU may still be at

    def enter(self, phase: Phase) -> Phase:
        """Ends the phase under way, which is returned, and begins another. Does not wait for a GPU."""
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
        if before in STEP:
            self.this_step += now - self.begun
        self.phase, self.begun = phase, now
        return before

    def cost(self) -> Cost:
        """Of the phase under way."""
        return self.costs.setdefault(self.phase, Cost())

    def settle(self, wait: bool = False) -> None:
        """Adds up what the GPU has measured so far, or all of it."""
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
        """`windows`, of each of which one step is made. Making them counts as data."""
        source = iter(windows)
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
    """Makes a function, or a block, a phase of its own; afterwards the phase around it goes on."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def _recreate_cm(self) -> "measured":
        return measured(self.phase)  # a decorated function may be entered twice

    def __enter__(self) -> None:
        self.before = ACCOUNT.enter(self.phase)

    def __exit__(self, *problem: object) -> None:
        ACCOUNT.enter("other" if self.before == "start" else self.before)


def watch_phases(model: Any, accelerator: Accelerator) -> None:
    """Marks the phases of a prepared model's step: forward until the loss's backward, then backward, then update."""

    def forward_begins(module: torch.nn.Module, inputs: object) -> None:
        if torch.is_grad_enabled():  # otherwise it validates
            ACCOUNT.enter("forward")

    model.register_forward_pre_hook(forward_begins)
    accelerator.backward = _as_phase(accelerator.backward, "backward", then="update")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # whose backward makes the update as well
        model.step = _as_phase(model.step, "update", then="backward")


def _as_phase(function: Callable[..., Any], phase: Phase, then: Phase) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        ACCOUNT.enter(phase)
        result = function(*args, **kwargs)
        ACCOUNT.enter(then)
        return result

    return wrapper


@functools.cache  # once is enough
def count_collectives() -> None:
    """From now on. Call it before DeepSpeed starts, which keeps references to these functions.

    DDP's own, which are C++, are not seen; DeepSpeed's logger would make every collective a blocking one.
    """
    within = False  # one that calls another counts once

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
    """Bytes of the largest tensor, or list of tensors, in a collective's arguments: the whole of what it is about."""
    sizes = [0]
    for argument in arguments:
        tensors = argument if isinstance(argument, list | tuple) else [argument]
        sizes.append(sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)))
    return max(sizes)


def peak_memory() -> int | None:
    """Bytes at their highest since the last call: of CUDA's allocator, or else resident in host memory."""
    if torch.cuda.is_available():
        if not torch.cuda.is_initialized():
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew at what is resident now
    except OSError:
        return None
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _larger(one: int | None, other: int | None) -> int | None:
    return max(one, other) if one is not None and other is not None else one or other
