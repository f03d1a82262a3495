"""Says how sure an accuracy is, and whether one model is better than another on the same rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964  # the 97.5 % quantile of the normal distribution: intervals are of 95 %
RESAMPLES = 10_000
LEVEL = 0.05  # a difference with a smaller p-value is called significant

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Holds the mean difference of two models' scores on the same rows, with its interval of 95 %."""

    difference: float
    interval: Interval
    p_value: float | None  # exact McNemar test; None for scores between right and wrong

    @property
    def significant(self) -> bool:
        """Whether chance alone would give such a difference in fewer than 5 % of such evaluations."""
        if self.p_value is not None:
            return self.p_value < LEVEL
        return not self.interval[0] <= 0 <= self.interval[1]


def mean_interval(scores: Sequence[float]) -> Interval:
    """Returns the 95 % interval of a mean score: Wilson's (1927) where each is 0 or 1, else by bootstrap."""
    if _right_or_wrong(scores):
        return wilson(sum(scores), len(scores))
    return _bootstrap(scores)


def compare(before: Sequence[float], after: Sequence[float]) -> Difference:
    """Compares two models' scores (0..1) on the same rows: after minus before.

    Where each score is 0 or 1, the interval is Newcombe's for paired proportions (Statistics in Medicine 17, 1998,
    2635-2650, method 10), and the p-value is that of the exact McNemar test. Otherwise the interval is a percentile
    bootstrap over the rows.
    """
    if not (_right_or_wrong(before) and _right_or_wrong(after)):
        differences = [b - a for a, b in zip(before, after, strict=True)]
        return Difference(sum(differences) / len(differences), _bootstrap(differences), None)
    pairs = list(zip(before, after, strict=True))
    both, better, worse, neither = (pairs.count(pair) for pair in ((1, 1), (0, 1), (1, 0), (0, 0)))
    return Difference((better - worse) / len(pairs), paired(both, better, worse, neither), mcnemar(better, worse))


def _right_or_wrong(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def wilson(right: float, n: int) -> Interval:
    """Returns Wilson's 95 % interval of a proportion."""
    p, z = right / n, Z * Z / n
    middle, half = (p + z / 2) / (1 + z), math.sqrt(z * (p * (1 - p) + z / 4)) / (1 + z)
    # Rounding must not take an end of the range off the interval.
    return max(0.0, middle - half) if right else 0.0, min(1.0, middle + half) if right < n else 1.0


def paired(both: int, better: int, worse: int, neither: int) -> Interval:
    """Returns the 95 % interval of the difference (better - worse) / n of paired proportions."""
    n = both + better + worse + neither
    after, before, difference = (both + better) / n, (both + worse) / n, (better - worse) / n
    (low_after, high_after), (low_before, high_before) = wilson(both + better, n), wilson(both + worse, n)
    spread = (both + better) * (worse + neither) * (both + worse) * (better + neither)
    together = both * neither - better * worse
    if together > 0:
        together = max(0, together - n / 2)  # type: ignore[assignment]
    phi = together / math.sqrt(spread) if spread else 0.0

    def distance(one: float, other: float) -> float:
        return math.sqrt(one * one - 2 * phi * one * other + other * other)

    low = difference - distance(after - low_after, high_before - before)
    high = difference + distance(high_after - after, before - low_before)
    return max(-1.0, low), min(1.0, high)


def mcnemar(better: int, worse: int) -> float:
    """Returns the two-sided p-value of the exact McNemar test: a fair coin thrown for each row that has changed."""
    n, fewer = better + worse, min(better, worse)
    ways: int = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, float(2 * ways / 2**n))


def _bootstrap(values: Sequence[float]) -> Interval:
    """Returns the 2.5 % and 97.5 % quantiles of the means of samples drawn from the rows, with a fixed seed."""
    rng, held = np.random.default_rng(0), np.asarray(values, dtype=float)
    means = [rng.choice(held, len(held)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
