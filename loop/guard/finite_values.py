"""Stops a run whose loss or gradient is not finite, before anything of that step is kept."""

import math
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from data.batch import Window
from loop.engine.accelerator import largest_of_ranks, mixed_precision
from loop.engine.optimizer_state import trainable_parameters
from loop.guard.process import RunError
from loop.step import StepResult

SHOWN = 20  # row numbers named


class FiniteCheck:
    """Looks at every step's loss and gradient norm, and says which rows are to blame where they are not finite.

    The engine adds the gradients of all micro-batches and ranks up, and at stage 3 the update is made when the norm
    is known. So a hook on each adapter keeps the sum of each micro-batch's gradient: on the device, and looked at only
    in a step that failed.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.sums: list[list[Tensor]] = []  # of each parameter, one for each micro-batch of the step
        for parameter in trainable_parameters(model).values():
            self.sums.append([])
            parameter.register_hook(partial(self._keep, self.sums[-1]))

    @staticmethod
    def _keep(sums: list[Tensor], gradient: Tensor) -> None:
        sums.append(gradient.sum())

    def check(self, step: int, window: Window, result: StepResult) -> None:
        """Raises RunError on every rank when `step` met NaN or infinity; every rank enters.

        In fp16 gradients may overflow, which lowers the loss scale, but losses may not.
        """
        finite = result.nlls.isfinite()
        if largest_of_ranks(not (math.isfinite(result.grad_norm) and finite.all()) or result.skipped, self.accelerator):
            if where := self._where(window, finite.tolist()):
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
        for sums in self.sums:
            sums.clear()

    def check_validation(self, step: int, loss: float) -> float:
        """`loss`; RunError on every rank when it is not finite."""
        if not math.isfinite(loss):
            raise RunError(f"step {step}: the validation loss is not finite. Nothing of this step was kept.")
        return loss

    def _finite_sums(self, count: int) -> list[bool]:
        """Of each of `count` micro-batches on this rank: whether all gradients summed up to finite numbers."""
        complete = [sums for sums in self.sums if len(sums) == count]  # all, unless a layer was not used in some
        return [all(bool(sums[i].isfinite()) for sums in complete) for i in range(count)]

    def _where(self, window: Window, finite: list[bool]) -> str:
        """Row numbers and rank of every micro-batch that is not finite on any rank; every rank enters."""
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
