"""loop/train.py, where the loss of row 6 is finite and its gradient is not."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import loop.train
from loop.guard.process import end_process
from loop.step import summed_nll


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nll: Tensor) -> Tensor:
        return nll.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return torch.full_like(gradients[0], torch.inf)


def poisoned_nll(model: Any, micro_batch: Any) -> Tensor:
    nll = summed_nll(model, micro_batch)
    result: Tensor = Poison.apply(nll) if 6 in micro_batch.rows else nll  # type: ignore[no-untyped-call]
    return result


if __name__ == "__main__":
    with patch("loop.step.summed_nll", poisoned_nll):
        end_process(loop.train.main)
