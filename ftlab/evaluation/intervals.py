"""95 % intervals: bootstrap over examples, and closed forms for a proportion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "bootstrap_interval",
    "bootstrap_sums",
    "drawn_counts",
    "exact_mcnemar",
    "paired_proportion_interval",
    "percentile_interval",
    "wilson_interval",
]

Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution
PERCENTILES = (2.5, 97.5)
BLOCK = 2**20  # counts drawn at once, 8 MiB: what is made of them stays small however many examples there are

Floats = NDArray[np.float64]


def drawn_counts(count: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of `count` examples occurs in each resample, as blocks of resamples [R, count], fp64.

    Drawing N of N examples with replacement is drawing how often each occurs from a multinomial distribution. The
    generator draws one resample after the other, so the blocks do not change them. The same (N, resamples, seed) draws
    the same examples, which pairs two models.
    """
    generator = np.random.default_rng(seed)
    chances = np.full(count, 1.0 / count)
    rows = max(1, BLOCK // count)
    for begin in range(0, resamples, rows):
        yield generator.multinomial(count, chances, size=min(rows, resamples - begin)).astype(np.float64)


def bootstrap_sums(statistics: Floats, resamples: int, seed: int) -> Floats:
    """Column sums of resampled examples, [examples, columns] -> [resamples, columns], fp64; see `drawn_counts`."""
    return np.concatenate([draws @ statistics for draws in drawn_counts(len(statistics), resamples, seed)])


def percentile_interval(values: Floats, otherwise: float) -> tuple[float, float]:
    """The percentiles of a score's resampled values; of one value, `otherwise`, if none is finite.

    NaN is passed over: a resample may miss a kind of example without which the score is not defined.
    """
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite if len(finite) else np.array([otherwise]), PERCENTILES)
    return float(low), float(high)


def bootstrap_interval(
    statistics: Floats, value: Callable[[Floats], Floats], resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of `value`, a function of the column sums; [R, columns] -> [R]."""
    low, high = np.percentile(value(bootstrap_sums(statistics, resamples, seed)), PERCENTILES)
    return float(low), float(high)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as fractions (Wilson 1927, JASA 22:209).

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Unlike the bootstrap it has a width when all examples agree: 0 of 300 gives 0 to 0.0126, not 0 to 0.
    """
    fraction = successes / count
    centre = fraction + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(fraction * (1 - fraction) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    low, high = (centre - half) / scale, (centre + half) / scale
    return (0.0 if successes == 0 else low), (1.0 if successes == count else high)


def paired_proportion_interval(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float]:
    """Interval of mean(second) - mean(first) on the same examples, as fractions.

    Newcombe's method 10 (Newcombe 1998, Statistics in Medicine 17:2635): the distances of the two Wilson limits from
    their proportions, combined as correlated errors with the phi coefficient of the 2 x 2 table. It has a width also
    when the two agree on every example, where the bootstrap has none.
    """
    count = len(first)
    both, only_first = int((first & second).sum()), int((first & ~second).sum())
    only_second = int((~first & second).sum())
    neither = count - both - only_first - only_second
    p1, p2 = (both + only_first) / count, (both + only_second) / count
    low1, high1 = wilson_interval(both + only_first, count)
    low2, high2 = wilson_interval(both + only_second, count)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = _corrected_phi(both * neither, only_first * only_second, count, margins)
    down, up = _combine(p2 - low2, high1 - p1, phi), _combine(high2 - p2, p1 - low1, phi)
    return p2 - p1 - down, p2 - p1 + up


def _corrected_phi(agreeing: int, disagreeing: int, count: int, margins: int) -> float:
    """Phi coefficient with Newcombe's continuity correction of a positive numerator; 0 for an empty margin."""
    if margins == 0:
        return 0.0
    numerator = float(agreeing - disagreeing)
    if numerator > 0:
        numerator = max(numerator - count / 2, 0.0)
    return numerator / math.sqrt(margins)


def _combine(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(first**2 - 2 * correlation * first * second + second**2, 0.0))


def exact_mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Two-sided exact p value that `first` and `second` succeed equally often on the same examples (McNemar 1947).

    Among the examples where they differ, either is as likely to be the better: a binomial with probability 1/2.
    """
    better, worse = int((second & ~first).sum()), int((first & ~second).sum())
    different = better + worse
    tail = sum(math.comb(different, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(2 * tail / 2**different))
