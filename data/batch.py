"""Makes micro-batches of token ids: decides which rows each rank computes at each micro-step.

A *window* holds the rows that one optimizer step learns from. It has micro_batch_size x grad_accum_steps x
num_processes rows; as long as this product stays the same, the same rows stand in the same window.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.examples import Example
from data.layout import Layout, MicroBatch, collate, stand_in

Order = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """One rank's share of the rows of an optimizer step, and the number of tokens on all ranks together."""

    micro_batches: list[MicroBatch]  # every rank has grad_accum_steps of them
    label_weight: float  # the weights of the labels of all ranks added up: without weights, the number of labels
    num_tokens: int  # tokens of all rows of all ranks, without padding


def num_windows(num_rows: int, rows_per_window: int) -> int:
    """The number of optimizer steps in an epoch; a last window that is not full counts."""
    return -(-num_rows // rows_per_window)


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(num_rows), which differs from epoch to epoch and is the same on every rank."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def windows(
    examples: Sequence[Example],
    order: Order,
    micro_batch_size: int,
    grad_accum_steps: int,
    num_processes: int,
    process_index: int,
    layout: Layout,
    pad_token_id: int,
) -> Iterator[Window]:
    """Yields this rank's share of each window of `examples` in `order`. Every row is computed by exactly one rank.

    A micro-batch without a row gets a stand-in of weight zero, because under ZeRO every rank has to enter every
    forward and backward pass.
    """
    for dealt in deal(examples, order, micro_batch_size, grad_accum_steps * num_processes, layout):
        chosen = [example for rows in dealt for example in rows]
        micro_batches = [
            collate(mine, layout, pad_token_id) if mine else stand_in(chosen[0], layout, pad_token_id)
            for mine in dealt[process_index::num_processes]
        ]
        weights = [(end - start) * weight for example in chosen for start, end, weight in example.spans]
        # fsum rounds once, so that the order of the rows does not matter.
        yield Window(micro_batches, math.fsum(weights), sum(example.length for example in chosen))


def deal(
    examples: Sequence[Example], order: Order, micro_batch_size: int, micro_batches: int, layout: Layout
) -> Iterator[list[list[Example]]]:
    """Yields for each window the rows of its micro-batches, ordered by micro-step and then by rank.

    The loss of a window is a sum over its rows, so any row may stand in any of its micro-batches. In the layout padded
    the rows of a micro-batch have similar lengths; in the other layouts all micro-batches have similar numbers of
    tokens, so that the ranks need the same time. A last window that is not full is dealt out evenly.
    """
    for start in range(0, len(order), micro_batch_size * micro_batches):
        chosen = [examples[i] for i in order[start : start + micro_batch_size * micro_batches]]
        chosen.sort(key=lambda example: example.length)
        if layout == "padded":
            bounds = [len(chosen) * cell // micro_batches for cell in range(micro_batches + 1)]
            yield [chosen[bounds[cell] : bounds[cell + 1]] for cell in range(micro_batches)]
        else:
            there_and_back = [*range(micro_batches), *reversed(range(micro_batches))]
            dealt: list[list[Example]] = [[] for _ in range(micro_batches)]
            for i, example in enumerate(reversed(chosen)):
                dealt[there_and_back[i % len(there_and_back)]].append(example)
            yield dealt


def empty_window(example: Example, grad_accum_steps: int, layout: Layout, pad_token_id: int) -> Window:
    """A window without a label: its loss and gradients are exactly zero."""
    return Window([stand_in(example, layout, pad_token_id)] * grad_accum_steps, label_weight=1.0, num_tokens=0)
