"""Finds the rows whose loss or gradient is not finite, before anything of that step is kept."""

import math
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.batch import Window
from loop.engine.accelerator import mixed_precision
from loop.engine.optimizer_state import trainable_parameters
from loop.guard.process import RunError
from loop.step import StepResult

SHOWN = 20  # row numbers that a message names


class FiniteCheck:
    """Looks at the loss and the gradient norm of each step, and says which rows are to blame where one is not finite.

    The engine adds up the gradients of all micro-batches and ranks, and by the time that the norm is known it has made
    the update. So a hook on each adapter keeps the sum of each micro-batch's gradient. The sums stay on the device,
    and only a step that failed has them looked at.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: list[list[Tensor]] = []  # for each parameter one sum for each micro-batch of the step
        for parameter in trainable_parameters(model).values():
            self.sums.append([])
            parameter.register_hook(partial(self._keep, self.sums[-1]))

    @staticmethod
    def _keep(sums: list[Tensor], gradient: Tensor) -> None:
        sums.append(gradient.sum())

    def holds(self, result: StepResult) -> bool:
        """Whether this rank saw finite numbers only, and the update was made."""
        finite = math.isfinite(result.grad_norm) and bool(result.nlls.isfinite().all())  # device sync
        return finite and not result.skipped

    def explain(self, step: int, window: Window, result: StepResult) -> None:
        """Raises RunError on every rank, with the rows of `step` that gave NaN or infinity; every rank enters.

        In fp16 it raises for a loss only: gradients may overflow there, which lowers the loss scale.
        """
        if where := self._where(window, result.nlls.isfinite().tolist()):
            raise RunError(
                f"step {step}: the loss is not finite in the micro-batch of {where}. Nothing of this step was "
                "kept. Look at these rows of the training file; if every rank is named, lower optim.lr."
            )
        if mixed_precision(self.accelerator) != "fp16":
            where = self._where(window, self._finite_sums(len(window.micro_batches)))
            where = f"the micro-batch of {where}" if where else "the sum over all micro-batches"
            raise RunError(
                f"step {step}: a gradient is not finite, though all losses are, in {where}. Nothing of this step "
                "was kept. Look at these rows; lower optim.lr, or set mixed_precision: no in the accelerate YAML."
            )

    def forget(self) -> None:
        """Drops the sums of a step that is done."""
        for sums in self.sums:
            sums.clear()

    def check_validation(self, step: int, loss: float) -> float:
        """Returns the validation loss. Raises RunError when it is not finite."""
        if not math.isfinite(loss):
            raise RunError(f"step {step}: the validation loss is not finite. Nothing of this step was kept.")
        return loss

    def _finite_sums(self, count: int) -> list[bool]:
        """For each of the `count` micro-batches of this rank, whether the sums of all its gradients are finite."""
        complete = [sums for sums in self.sums if len(sums) == count]  # fewer: a layer was not always used
        return [all(bool(sums[i].isfinite()) for sums in complete) for i in range(count)]

    def _where(self, window: Window, finite: list[bool]) -> str:
        """Names the rows and the rank of every micro-batch that is not finite, on any rank; every rank enters.

        `finite` says of each of this rank's micro-batches whether it is finite. Empty text where all are.
        """
        bad_here = [
            (self.accelerator.process_index, micro_batch.rows)
            for ok, micro_batch in zip(finite, window.micro_batches, strict=True)
            if not ok
        ]
        everywhere = gather_object(bad_here)  # collective
        return "; ".join(
            f"rows {', '.join(map(str, bad[:SHOWN]))}{' …' if len(bad) > SHOWN else ''} on rank {rank}"
            for rank, bad in everywhere
        )
