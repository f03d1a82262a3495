from fractions import Fraction
from typing import get_args

import pytest
import torch

from data.batch import Order, Window, epoch_order, num_windows, windows
from data.examples import Example, Span
from data.layout import IGNORE_INDEX, Layout, collate


def make(count: int) -> list[Example]:
    """Rows of very unequal lengths whose tokens tell which row they belong to."""
    return [Example.of(i + 1, [1000 + i] * (2 + i % 5), [2000 + i] * (1 + i % 7)) for i in range(count)]


def all_ranks(
    count: int, micro: int, accum: int, processes: int, order: Order | None = None, layout: Layout = "padded"
) -> list[list[Window]]:
    """[rank][window]"""
    chosen: Order = list(range(count)) if order is None else order
    return [list(windows(make(count), chosen, micro, accum, processes, rank, layout, 0)) for rank in range(processes)]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 33, 64])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prefix"])
@pytest.mark.parametrize(("micro", "accum", "processes"), [(1, 1, 1), (4, 1, 2), (2, 4, 2), (3, 2, 3), (16, 4, 2)])
def test_every_row_once_and_every_rank_as_often(
    count: int, micro: int, accum: int, processes: int, layout: Layout
) -> None:
    ranks = all_ranks(count, micro, accum, processes, epoch_order(count, 42, 3), layout)
    assert {len(share) for share in ranks} == {num_windows(count, micro * accum * processes)}
    seen: list[int] = []
    for parts in zip(*ranks, strict=True):
        rows = [row for window in parts for batch in window.micro_batches for row in batch.rows]
        seen += rows
        assert all(len(window.micro_batches) == accum for window in parts)
        assert all(len(batch.own) <= micro for window in parts for batch in window.micro_batches)
        labels = sum(int((b.labels != IGNORE_INDEX).sum()) for window in parts for b in window.micro_batches)
        examples = [make(count)[row - 1] for row in rows]
        assert {window.label_weight for window in parts} == {labels}
        assert labels == sum(len(example.label_ids) for example in examples)
        assert {window.num_tokens for window in parts} == {
            sum(len(example.prompt_ids + example.label_ids) for example in examples)
        }
    assert sorted(seen) == list(range(1, count + 1))


def test_a_window_holds_the_same_rows_however_many_processes() -> None:
    def rows(micro: int, accum: int, processes: int) -> list[list[int]]:
        ranks = all_ranks(33, micro, accum, processes, epoch_order(33, 42, 0))
        return [sorted(r for w in parts for b in w.micro_batches for r in b.rows) for parts in zip(*ranks, strict=True)]

    assert rows(8, 1, 1) == rows(4, 1, 2) == rows(1, 4, 2) == rows(1, 8, 1)


def test_leftover_rows_are_dealt_out_evenly() -> None:
    ranks = all_ranks(7, 4, 1, 2)
    assert [len(share[0].micro_batches[0].rows) for share in ranks] == [3, 4]


def test_a_stand_in_weighs_nothing() -> None:
    ranks = all_ranks(1, 2, 2, 2)
    filled = [batch for share in ranks for batch in share[0].micro_batches if batch.rows]
    empty = [batch for share in ranks for batch in share[0].micro_batches if not batch.rows]
    assert (len(filled), len(empty)) == (1, 3)
    assert all((batch.labels == IGNORE_INDEX).all() and batch.input_ids.numel() > 0 for batch in empty)


def test_order_is_a_permutation_of_its_own_each_epoch() -> None:
    orders = [epoch_order(100, 42, epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(100, 42, 1).tolist() == orders[1]
    assert epoch_order(100, 43, 1).tolist() != orders[1]


@pytest.mark.parametrize("layout", get_args(Layout))
def test_all_of_a_micro_batch_moves(layout: Layout) -> None:
    """To the meta device, because no other one is at hand everywhere."""
    made = collate([Example.of(1, [1, 2], [3]), Example.of(2, [1, 4], [5, 6])], layout, 0)
    moved = made.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    if moved.apart is not None:
        tensors += [*moved.apart.groups, moved.apart.back]
    assert len(tensors) >= 4
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.labels.shape == made.labels.shape


def test_the_weight_of_a_window_is_exact() -> None:
    """It is the same in whichever order the rows come, and equals the sum of exact fractions."""
    weights = [0.1, 0.7, 1e-9, 3.0, 0.3]
    rows = [Example(i, [1, 2, 3, 4], (Span(1, 2, w), Span(2, 4, w / 3))) for i, w in enumerate(weights)]
    exact = float(sum((Fraction(w) + 2 * Fraction(w / 3) for w in weights), Fraction()))
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        (window,) = windows(rows, order, 5, 1, 1, 0, "padded", 0)
        assert window.label_weight == exact
        assert window.num_tokens == 20
