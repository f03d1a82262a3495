"""One optimizer step, every operation spelled out. This is the file to step through in a debugger."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import Window
from data.layout import MicroBatch
from loop.measure.phases import measured


@dataclass(frozen=True)
class StepResult:
    nlls: Tensor  # [grad_accum_steps], nats, on the device: each summed over this rank's label tokens
    grad_norm: float  # global 2-norm before clipping
    lr: float  # learning rate of this update
    skipped: bool  # DeepSpeed found a gradient that is not finite and left the weights alone


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes the dropout masks of a step depend on these three alone, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


@measured("data")  # until the first forward pass
def train_step(
    window: Window,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float,
    accelerator: Accelerator,
) -> StepResult:
    """Learns one window; every rank enters.

    The loss is the mean over the label tokens of the whole window, so every token weighs the same
    however the rows fall into micro-batches and onto ranks.
    """
    nlls = []
    # Both are divided out again: accelerate by the accumulation, DDP and DeepSpeed by the ranks.
    undo_averaging = accelerator.gradient_accumulation_steps * accelerator.num_processes
    for micro_batch in window.micro_batches:
        micro_batch = micro_batch.to(accelerator.device)
        with accelerator.accumulate(model):  # the last micro-batch of the window is the boundary
            nll = summed_nll(model, micro_batch)
            loss = nll / window.num_label_tokens * undo_averaging
            # collective. DeepSpeed: at the boundary this also clips, steps and zeroes the gradients
            accelerator.backward(loss)
            if accelerator.sync_gradients:  # DeepSpeed: only reads the norm that `backward` clipped by
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
            optimizer.step()  # DeepSpeed: no-op; otherwise no-op before the boundary
            optimizer.zero_grad()  # likewise
        nlls.append(nll.detach())
    lr = float(optimizer.param_groups[0]["lr"])
    skipped = accelerator.optimizer_step_was_skipped
    if not skipped:
        lr_scheduler.step()  # once an update, whatever the number of ranks
    return StepResult(torch.stack(nlls), grad_norm, lr, skipped)


def summed_nll(model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Scalar: cross entropy in nats, summed over the label tokens of `micro_batch`; collective under ZeRO-3.

    The model computes it itself, for the N label positions only (loop/model/head.py), so that there are never more
    logits than are needed at a time.
    """
    nll: Tensor = model(
        **micro_batch.inputs,  # [B, T]
        predicts=micro_batch.predicts,  # [N], places in B x T
        labels=micro_batch.label_ids,  # [N]
    )
    return nll


@measured("validate")
@torch.no_grad()
def validate(window_share: Iterable[Window], model: torch.nn.Module, accelerator: Accelerator) -> float:
    """Mean cross entropy (nats) over all label tokens of all ranks' windows; every rank enters."""
    model.eval()
    nll, num_label_tokens = torch.zeros((), device=accelerator.device), 0
    for window in window_share:
        for micro_batch in window.micro_batches:
            nll += summed_nll(model, micro_batch.to(accelerator.device))
        num_label_tokens += window.num_label_tokens
    model.train()
    total = accelerator.reduce(nll, reduction="sum")  # collective
    assert isinstance(total, Tensor)
    return total.item() / num_label_tokens
