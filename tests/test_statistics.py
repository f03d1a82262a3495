"""Intervals and tests against published values, exact coverage by enumeration, and brute force."""

import math
from itertools import product

import numpy as np
import pytest

from eval.judging.statistics import compare, mcnemar, mean_interval, paired, wilson


def test_wilson_against_the_score_test() -> None:
    """An end of the interval is a proportion p whose score test just rejects: |right/n - p| = z sqrt(p (1 - p) / n)."""
    for right, n in ((1, 10), (5, 10), (9, 10), (81, 263), (0, 20), (20, 20)):
        for p, rejects in zip(wilson(right, n), (right > 0, right < n), strict=True):
            if rejects:
                assert abs(right / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == 1
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I: 81 of 263 has the score interval 0.2553 to 0.3662
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


# probabilities that both models are right, the second alone, the first alone, neither
TRUTHS = (
    *((0.4, 0.3, 0.1, 0.2), (0.25, 0.25, 0.25, 0.25), (0.7, 0.1, 0.1, 0.1)),
    *((0.05, 0.8, 0.05, 0.1), (0.2, 0.05, 0.4, 0.35)),
)


@pytest.mark.parametrize("n", [10, 25])
def test_the_paired_interval_covers_the_truth(n: int) -> None:
    """Over all tables of n pairs, weighted by their multinomial probability, the interval holds the true difference in
    about 95 % of cases: never below 90 %, and 93.5 % on average."""
    tables = [(a, b, c, n - a - b - c) for a, b, c in product(range(n + 1), repeat=3) if a + b + c <= n]
    intervals = np.array([paired(*table) for table in tables])
    ways = np.array([math.factorial(n) / math.prod(map(math.factorial, table)) for table in tables])
    covered = []
    for truth in TRUTHS:
        weights = ways * np.prod(np.array(truth) ** np.array(tables), axis=1)
        assert weights.sum() == pytest.approx(1)
        difference = truth[1] - truth[2]
        covered.append(weights[(intervals[:, 0] <= difference) & (difference <= intervals[:, 1])].sum())
    assert min(covered) > 0.9
    assert np.mean(covered) > 0.935


def test_the_paired_interval_stays_in_range_and_is_symmetric() -> None:
    for table in ((0, 20, 0, 0), (20, 0, 0, 0), (0, 0, 20, 0), (0, 0, 0, 20), (3, 5, 2, 10)):
        low, high = paired(*table)
        both, better, worse, neither = table
        assert -1 <= low <= (better - worse) / 20 <= high <= 1
        assert low < high, "20 rows never make anything certain"
        assert paired(both, worse, better, neither) == pytest.approx((-high, -low))
    assert paired(0, 20, 0, 0)[0] > 0.7


def test_mcnemar_by_brute_force() -> None:
    """All 2^n ways in which n changed rows may fall: the share that is at least as one-sided as what was seen."""
    for better, worse in ((0, 0), (1, 0), (5, 0), (10, 2), (3, 3), (2, 7)):
        n, seen = better + worse, abs(better - worse)
        ways = [abs(2 * sum(fall) - n) >= seen for fall in product((0, 1), repeat=n)]
        assert mcnemar(better, worse) == pytest.approx(sum(ways) / len(ways))
    assert 0 <= mcnemar(3000, 0) < 1e-300


def test_two_models() -> None:
    better = compare([0.0] * 18 + [1.0, 0.0], [1.0] * 18 + [1.0, 0.0])
    assert (better.difference, better.significant) == (0.9, True)
    assert better.p_value == pytest.approx(2 / 2**18)
    same = compare([0.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    assert (same.difference, same.p_value, same.significant) == (0.0, 1.0, False)


def test_scores_between_right_and_wrong() -> None:
    """For many rows the bootstrap comes near the normal interval of the mean."""
    scores = np.random.default_rng(3).random(400)
    half = 1.96 * scores.std(ddof=1) / 20
    assert mean_interval(list(scores)) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.003)
    found = compare(list(scores), list(scores + 0.0))
    assert (found.difference, found.p_value, found.significant) == (0.0, None, False)
    assert compare([0.5] * 30, [0.75] * 30).significant
