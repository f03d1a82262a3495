"""Stops a run whose loss or gradient is not finite, before anything of that step is kept."""

import math

from accelerate import Accelerator
from accelerate.utils import gather_object

from data.batch import Window
from data.errors import RunError
from loop.engine import mixed_precision
from loop.step import StepResult

SHOWN = 20  # row numbers named


def check_finite(step: int, window: Window, result: StepResult, accelerator: Accelerator) -> None:
    """Raises RunError on every rank when `step` met NaN or infinity; every rank enters.

    It costs nothing where all is well: NaN anywhere makes the global gradient norm, which every rank knows,
    not finite. In fp16 gradients may overflow, which lowers the loss scale, but losses may not.
    """
    if math.isfinite(result.grad_norm) and not result.skipped:
        return
    bad_here = [
        (accelerator.process_index, micro_batch.rows)
        for nll, micro_batch in zip(result.nlls.tolist(), window.micro_batches, strict=True)
        if not math.isfinite(nll)
    ]
    everywhere = gather_object(bad_here)  # collective
    if everywhere:
        where = "; ".join(
            f"rows {', '.join(map(str, bad[:SHOWN]))}{' …' if len(bad) > SHOWN else ''} on rank {rank}"
            for rank, bad in everywhere
        )
        raise RunError(
            f"step {step}: the loss is not finite in the micro-batch of {where}. Nothing of this step was kept. "
            "Look at these rows of the training file; if every rank is named, lower optim.lr."
        )
    if mixed_precision(accelerator) != "fp16":
        raise RunError(
            f"step {step}: a gradient is not finite, though all losses are. Nothing of this step was kept. "
            "Lower optim.lr, or set mixed_precision: no in the accelerate YAML."
        )
