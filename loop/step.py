"""One optimizer step, every operation spelled out. This is the file to step through in a debugger."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from data.batch import Window
from data.layout import MicroBatch
from loop.measure.phases import measured


@dataclass(frozen=True)
class StepResult:
    nlls: Tensor  # [grad_accum_steps], nats, on the device: each is summed over this rank's label tokens
    grad_norm: float  # global 2-norm of the gradient before clipping
    lr: float  # learning rate of this update
    skipped: bool  # True where a gradient was not finite and DeepSpeed left the weights alone


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Makes the dropout masks of a step depend on these three numbers alone, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def train_step(
    window: Window,
    model: Any,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    max_grad_norm: float,
    accelerator: Accelerator,
) -> StepResult:
    """Learns one window; every rank enters.

    The loss is the mean cross entropy over the label tokens of the whole window, each with its weight, so a token
    weighs the same however the rows fall into micro-batches and onto ranks. Each block below is a phase of usage.json.
    """
    under_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    # Accelerate and DeepSpeed divide by the number of micro-batches; DDP and DeepSpeed average over the ranks.
    undo_averaging = accelerator.gradient_accumulation_steps * accelerator.num_processes
    nlls = []
    for micro_batch in window.micro_batches:
        with measured("data"):
            micro_batch = micro_batch.to(accelerator.device)
        with accelerator.accumulate(model):  # sync_gradients is true in the last micro-batch of the window only
            with measured("forward"):
                nll = summed_nll(model, micro_batch)  # cross entropy in nats, summed over label tokens
                loss = nll / window.label_weight * undo_averaging
            with measured("backward"):  # collective: the ranks' gradients are added up
                if under_deepspeed:
                    model.set_gradient_accumulation_boundary(accelerator.sync_gradients)
                    model.backward(loss)
                else:
                    accelerator.backward(loss)
            nlls.append(nll.detach())
            if accelerator.sync_gradients:
                with measured("update"):
                    lr = float(optimizer.param_groups[0]["lr"])
                    if under_deepspeed:
                        model.step()  # one call clips the gradients, updates the weights and zeroes the gradients
                        grad_norm = float(model.get_global_grad_norm())
                    else:
                        grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
                    optimizer.step()  # under DeepSpeed a no-op that the schedule waits for
                    optimizer.zero_grad()  # under DeepSpeed a no-op
                    skipped = accelerator.optimizer_step_was_skipped
                    if not skipped:
                        lr_scheduler.step()  # once an update, whatever the number of ranks
    return StepResult(torch.stack(nlls), grad_norm, lr, skipped)


def summed_nll(model: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    """The cross entropy of a micro-batch in nats, times its weight and summed over its label tokens; a scalar.
    Collective under ZeRO-3.

    The model returns what these lines would:

        hidden = decoder(**inputs).last_hidden_state.flatten(0, 1)   # [B x T, hidden size]
        logits = lm_head(hidden[predicts]).float()                   # [N, vocab], for the N label tokens only
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none") @ weights

    It computes them inside (loop/model/head.py), a few label tokens at a time, because the logits of a long answer
    over a vocabulary of 152,064 tokens do not fit into memory all at once.
    """
    nll: Tensor = model(
        **micro_batch.inputs,  # input_ids [B, T], and what the layout needs beside them
        predicts=micro_batch.predicts,  # [N], the places in B x T of the tokens that stand before a label
        labels=micro_batch.label_ids,  # [N]
        weights=micro_batch.label_weights,  # [N], or None where each weighs 1
    )
    return nll


@measured("validate")
@torch.no_grad()
def validate(
    parts: Mapping[str, Iterable[Window]], model: torch.nn.Module, accelerator: Accelerator
) -> dict[str, float]:
    """val/loss: the mean cross entropy (nats) over all label tokens of all ranks' windows, with weights. Where there
    are several parts, val/loss/<part> has the mean of each. Every rank enters.
    """
    model.eval()
    nlls, label_weights = torch.zeros(len(parts), device=accelerator.device), [0.0] * len(parts)
    for i, window_share in enumerate(parts.values()):
        for window in window_share:
            for micro_batch in window.micro_batches:
                nlls[i] += summed_nll(model, micro_batch.to(accelerator.device))
            label_weights[i] += window.label_weight
    model.train()
    total = accelerator.reduce(nlls, reduction="sum")  # collective
    assert isinstance(total, Tensor)
    losses = {"val/loss": total.sum().item() / sum(label_weights)}
    if len(parts) > 1:
        losses |= {f"val/loss/{name}": total[i].item() / label_weights[i] for i, name in enumerate(parts)}
    return losses
