"""Token ids -> micro-batches: which rows each rank computes at each micro-step, and their tensors.

A *window* is what one optimizer step learns from: micro_batch_size x grad_accum_steps x num_processes
rows, the same rows in the same order whatever the number of processes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.chat import Example

IGNORE_INDEX = -100


@dataclass(frozen=True)
class MicroBatch:
    """B rows padded on the right to the longest, T tokens; all tensors [B, T].

    attention_mask is 0 on padding. labels holds the token ids of the answers, each in its token's own
    place, and IGNORE_INDEX elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: list[int]  # row numbers in the data file; none in a stand-in

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), self.rows)


@dataclass(frozen=True)
class Window:
    """One rank's share of an optimizer step, and the label tokens of the whole of it."""

    micro_batches: list[MicroBatch]  # grad_accum_steps of them on every rank
    num_label_tokens: int  # over all micro-batches of all ranks
    num_tokens: int  # likewise, prompts and answers, without padding


def num_windows(num_rows: int, rows_per_window: int) -> int:
    """Optimizer steps in one epoch; a last window that is not full counts."""
    return -(-num_rows // rows_per_window)


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(num_rows), its own for every epoch, the same on every rank."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(num_rows).tolist()
    return order


def windows(
    examples: Sequence[Example],
    order: Sequence[int],
    micro_batch_size: int,
    grad_accum_steps: int,
    num_processes: int,
    process_index: int,
    pad_token_id: int,
) -> Iterator[Window]:
    """This rank's windows over `examples` in `order`, every row exactly once over all ranks.

    The last window's leftover rows are dealt out evenly; a cell with none gets a stand-in of weight zero,
    because under ZeRO every rank has to enter every forward and backward.
    """
    cells = grad_accum_steps * num_processes
    for start in range(0, len(order), micro_batch_size * cells):
        chosen = [examples[i] for i in order[start : start + micro_batch_size * cells]]
        bounds = [len(chosen) * cell // cells for cell in range(cells + 1)]
        micro_batches = []
        for micro_step in range(grad_accum_steps):
            cell = micro_step * num_processes + process_index
            mine = chosen[bounds[cell] : bounds[cell + 1]]
            micro_batches.append(collate(mine, pad_token_id) if mine else _stand_in(chosen[0], pad_token_id))
        num_label_tokens = sum(len(example.answer_ids) for example in chosen)
        num_prompt_tokens = sum(len(example.prompt_ids) for example in chosen)
        yield Window(micro_batches, num_label_tokens, num_label_tokens + num_prompt_tokens)


def empty_window(example: Example, grad_accum_steps: int, pad_token_id: int) -> Window:
    """A window without a label: its loss and gradients are exactly zero."""
    return Window([_stand_in(example, pad_token_id)] * grad_accum_steps, num_label_tokens=1, num_tokens=0)


def collate(examples: Sequence[Example], pad_token_id: int) -> MicroBatch:
    """One MicroBatch of the given rows. Padding is masked out of attention and loss."""
    shape = (len(examples), max(len(example.prompt_ids) + len(example.answer_ids) for example in examples))
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for i, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(example.prompt_ids) + len(example.answer_ids)
        input_ids[i, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        attention_mask[i, :end] = 1
        labels[i, start:end] = torch.tensor(example.answer_ids)
    return MicroBatch(input_ids, attention_mask, labels, [example.row for example in examples])


def _stand_in(example: Example, pad_token_id: int) -> MicroBatch:
    """A micro-batch whose loss and gradient are exactly zero: one row without a label."""
    batch = collate([example], pad_token_id)
    return replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), rows=[])
