"""One optimizer step, every operation spelled out. This is the file to step through in a debugger."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from data.batch import IGNORE_INDEX, MicroBatch, Window


@dataclass(frozen=True)
class StepResult:
    nll: Tensor  # scalar, nats, on the device: summed over this rank's label tokens of the window
    grad_norm: float  # global 2-norm before clipping
    lr: float  # learning rate of this update


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
    window_nll = torch.zeros((), device=accelerator.device)
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
        window_nll += nll.detach()
    lr = float(optimizer.param_groups[0]["lr"])
    if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflowed
        lr_scheduler.step()  # once an update, whatever the number of ranks
    return StepResult(window_nll, grad_norm, lr)


def summed_nll(model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Scalar: cross entropy in nats, summed over the label tokens of `micro_batch`; collective under ZeRO-3."""
    longest_answer = micro_batch.labels.shape[1]  # K
    output = model(
        input_ids=micro_batch.input_ids,
        attention_mask=micro_batch.attention_mask,
        position_ids=micro_batch.position_ids,
        # lm_head only where answers stand: all of them end at the right edge. A position predicts the
        # token after it, so the K labels come from K + 1 positions without the last.
        logits_to_keep=longest_answer + 1,
    )
    logits = output.logits[:, :-1].float()  # [B, K, vocab]
    return cross_entropy(logits.flatten(0, 1), micro_batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


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
