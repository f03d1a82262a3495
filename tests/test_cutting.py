"""The choice of a micro-batch size, against trying out every one."""

import random
from collections.abc import Sequence

import pytest

from loop.planning.cutting import ENOUGH, PER_MICRO_BATCH, choose_cut, possible_sizes


def test_sizes_divide_the_share_and_are_of_use() -> None:
    assert possible_sizes(32, 50.0) == [32, 16, 8, 4, 2, 1]
    assert possible_sizes(12, 50.0) == [12, 6, 4, 3, 2, 1]
    assert possible_sizes(64, ENOUGH / 16) == [16, 8, 4, 2, 1]
    assert possible_sizes(8, 10 * ENOUGH) == [1], "a row is not cut up"


@pytest.mark.parametrize("recomputing", [(False, True), (False,), (True,)])
def test_the_fastest_that_fits_is_chosen(recomputing: Sequence[bool]) -> None:
    """Random memories and rows. A step costs its tokens, a third more with recomputation, and 512 a micro-batch; where
    a micro-batch gathers the weights, it costs 8,192 tokens at least."""
    drawn = random.Random(0)
    for _ in range(300):
        gathers = drawn.random() < 0.5
        share, tokens = drawn.choice([1, 6, 16, 32, 60]), drawn.choice([20, 200, 2000])
        most = {False: drawn.uniform(0, 40), True: drawn.uniform(0, 400)}  # rows that fit

        def fits(rows: int, recomputes: bool, most: dict[bool, float] = most) -> bool:
            return rows <= most[recomputes]

        least = 8192 if gathers else 0

        def cost(cut: tuple[int, bool], share: int = share, tokens: int = tokens, least: int = least) -> float:
            rows, recomputes = cut
            return share / rows * (max(rows * tokens * (4 / 3 if recomputes else 1), least) + PER_MICRO_BATCH)

        sizes = possible_sizes(share, tokens)
        fitting = [(rows, again) for rows in sizes for again in recomputing if fits(rows, again)]
        found = choose_cut(sizes, tokens, recomputing, fits, gathers)
        if fitting:
            assert found in fitting
            assert cost(found) == pytest.approx(min(map(cost, fitting)))
        else:
            assert found == (1, recomputing[-1])


def test_long_rows_are_cut_up_before_they_are_recomputed() -> None:
    """Four micro-batches of 4 x 1,024 tokens cost 2,048 tokens more, recomputation of 16,384 tokens 5,461; for short
    rows it is the other way round."""
    assert choose_cut([16, 8, 4, 2, 1], 1024, (False, True), lambda rows, again: again or rows <= 4) == (4, False)
    assert choose_cut([16, 8, 4, 2, 1], 50, (False, True), lambda rows, again: again or rows <= 4) == (16, True)
