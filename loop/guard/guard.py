"""What all ranks agree on after each step: whether its numbers are finite, and whether a signal asks them to stop."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from data.batch import Window
from loop.guard.finite_values import FiniteCheck
from loop.guard.ranks import Watch
from loop.guard.signals import StopSignals
from loop.step import StepResult


class Guard:
    """Checks each step, and takes SIGTERM and SIGINT while the context is open."""

    def __init__(self, model: torch.nn.Module, watch: Watch, accelerator: Accelerator) -> None:
        self.watch = watch
        self.finite = FiniteCheck(model, accelerator)
        self.signals = StopSignals()
        self.accelerator = accelerator

    def __enter__(self) -> "Guard":
        self.signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.signals.__exit__(*error)

    def check(self, step: int, window: Window, result: StepResult) -> int:
        """The signal that any rank has received and after which all stop, or 0; every rank enters.

        Raises RunError on every rank when `step` met NaN or infinity. One collective tells each rank of both.
        """
        self.watch.step = step
        here = int(not self.finite.holds(result)), self.signals.received
        not_finite, signal = largest_of_each(here, self.accelerator)  # collective; device sync
        if not_finite:
            self.finite.explain(step, window, result)  # raises, unless fp16 only lowers its loss scale
        self.finite.forget()
        self.signals.agree(signal)
        return signal

    def check_validation(self, step: int, loss: float) -> float:
        """Returns the validation loss, which is the same on every rank. Raises RunError when it is not finite."""
        return self.finite.check_validation(step, loss)


def largest_of_each(values: Sequence[int], accelerator: Accelerator) -> list[int]:
    """For each place in `values`, the largest number that any rank has there; every rank enters."""
    if accelerator.num_processes == 1:
        return list(values)
    largest = torch.tensor(values, device=accelerator.device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)  # collective
    return [int(value) for value in largest.tolist()]
