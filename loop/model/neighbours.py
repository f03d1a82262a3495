"""Tries out, on the real model, whether a row's loss depends on the rows beside it in a micro-batch.

It depends on them where a layer carries a state from row to row, counts positions through the whole micro-batch, or
sets itself by the longest row. Nothing here knows the kinds: whatever the cause is, the losses differ.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch

from data.examples import Example, lengths_of
from data.layout import Layout, MicroBatch, collate
from loop.step import summed_nll

# The gap that rounding alone may make. Measured on the embedded model and on 32 random layers: at most 3e-6, 0.003 and
# 0.03. Rows that see one another made gaps above 0.1 in every kind of model that was tried.
TOLERANCES = {"no": 1e-3, "fp16": 0.02, "bf16": 0.1}


def rows_to_try(examples: Sequence[Example], micro_batch_size: int) -> list[Example]:
    """The rows of one micro-batch, longest first: the longest and the shortest of all, and the first of the others."""
    lengths = lengths_of(examples)
    ends = [int(np.argmax(lengths)), int(np.argmin(lengths))]
    others = (i for i in range(len(examples)) if i not in ends)
    chosen = list(dict.fromkeys([*ends, *(i for i, _ in zip(others, range(micro_batch_size - 2), strict=False))]))
    rows = [examples[i] for i in chosen[:micro_batch_size]]
    return sorted(rows, key=lambda example: -example.length)


def tried(rows: Sequence[Example]) -> list[int]:
    """The places of the rows whose loss is computed twice, alone and among others: one in the middle and the last,
    which is the shortest."""
    return sorted({(len(rows) - 1) // 2, len(rows) - 1})


@torch.no_grad()
def losses_alone(
    model: torch.nn.Module, rows: Sequence[Example], pad_token_id: int, device: torch.device
) -> list[float]:
    """The loss of each of the tried `rows` in a micro-batch of its own, in nats for each label token.

    `model` is in evaluation mode, has its own attention, and returns the summed loss. Collective under ZeRO-3.
    """
    batches = [collate([rows[i]], "padded", pad_token_id).to(device) for i in tried(rows)]
    return [_mean_nll(model, batch, slice(None)) for batch in batches]


@torch.no_grad()
def losses_among_others(
    model: torch.nn.Module, rows: Sequence[Example], layout: Layout, pad_token_id: int, device: torch.device
) -> list[float]:
    """The same losses where all `rows` share one micro-batch, for which the model has the attention of `layout`."""
    together = collate(rows, layout, pad_token_id).to(device)
    ends = list(accumulate((row.num_labels for row in rows), initial=0))
    return [_mean_nll(model, together, slice(ends[i], ends[i + 1])) for i in tried(rows)]


def _mean_nll(model: torch.nn.Module, batch: MicroBatch, labels: slice) -> float:
    """The mean loss over these labels of the batch alone, without their weights."""
    predicts, label_ids = batch.predicts[labels], batch.label_ids[labels]
    only = replace(batch, predicts=predicts, label_ids=label_ids, label_weights=None)
    return summed_nll(model, only).item() / len(label_ids)


def largest_gap(alone: Sequence[float], among: Sequence[float]) -> float:
    """The largest difference between the losses, as a share of the loss alone where that is above 1, because rounding
    grows with it.

    A row whose loss alone is not finite tells nothing of its neighbours; training itself stops at such a loss, and
    names the layer. Infinite where only the loss among others is not finite.
    """
    pairs = [(a, b) for a, b in zip(alone, among, strict=True) if math.isfinite(a)]
    if not all(math.isfinite(b) for _, b in pairs):
        return math.inf
    return max((abs(a - b) / max(1.0, a) for a, b in pairs), default=0.0)
