"""Intervals from few repeats: relative noise is pooled over the levels of a curve, and t does the rest. Pure.

Noise is relative, so everything is done on the natural logarithm: a level that is ten times as fast scatters ten times
as far, but by the same factor. Three repeats alone say little about their own noise; those of all levels together do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import mul

CONFIDENCE = 0.95
"""Of every interval, and of every one-sided comparison of levels."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A level's value in the unit of its repeats: their geometric mean, and between what it lies."""

    centre: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Noise:
    """How much one repeat scatters about its level."""

    sd: float
    """Standard deviation of the natural logarithm of one repeat: 0.02 is about 2 %."""
    df: int
    """Degrees of freedom it was estimated from: repeats - levels, over the levels with several repeats."""

    def margin(self, variance_of_one: float, tail: float) -> float:
        """Return t * standard error of a contrast of logarithms, which it exceeds by chance with probability `tail`.

        `variance_of_one`: the contrast's variance where one repeat has a variance of one, sum of a_i ** 2 / n_i.
        """
        return t_quantile(1 - tail, self.df) * self.sd * math.sqrt(variance_of_one)

    def interval(self, values: Sequence[float]) -> Interval:
        """Return the `CONFIDENCE` interval of a level's geometric mean from its repeats (one is enough), each > 0."""
        return self._about(values, 1 / len(values))

    def prediction(self, values: Sequence[float]) -> Interval:
        """Return the same of one further repeat, which scatters, too: its variance is 1 + 1 / n of a repeat's."""
        return self._about(values, 1 + 1 / len(values))

    def _about(self, values: Sequence[float], variance_of_one: float) -> Interval:
        centre, margin = mean_log(values), self.margin(variance_of_one, (1 - CONFIDENCE) / 2)
        return Interval(math.exp(centre), math.exp(centre - margin), math.exp(centre + margin))


def mean_log(values: Sequence[float]) -> float:
    """Return the mean of the natural logarithms of values > 0; `values` must not be empty."""
    return math.fsum(map(math.log, values)) / len(values)


@dataclass(frozen=True, slots=True)
class Spread:
    """How far some logarithms lie from what was fitted to them."""

    squares: float
    """Sum of the squared residuals."""
    df: int
    """Values less fitted parameters; 0 says nothing."""


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of a level's repeats (> 0) about their mean."""
    return Spread(math.fsum((math.log(v) - mean_log(values)) ** 2 for v in values), max(len(values) - 1, 0))


def pooled_noise(levels: Iterable[Sequence[float]]) -> Noise | None:
    """Return the noise pooled over levels, each given by its repeats (> 0); None where no level has two repeats."""
    return pooled([spread(values) for values in levels])


def pooled(spreads: Sequence[Spread]) -> Noise | None:
    """Return the noise that all have in common; None where none has a degree of freedom.

    Pooled variance: all squares over all degrees of freedom (Student, Biometrika 6, 1908; Snedecor and Cochran,
    Statistical Methods). What has none adds nothing and borrows the others'. It takes noise for the same everywhere.
    """
    df = sum(each.df for each in spreads)
    return Noise(math.sqrt(math.fsum(each.squares for each in spreads if each.df) / df), df) if df else None


def scatter_alike(spreads: Sequence[Spread]) -> bool:
    """Return whether one noise may stand for all: Bartlett's statistic is below its median under equal variances.

    Bartlett, Proceedings of the Royal Society A 160, 1937. The median of chi-square is Wilson and Hilferty's (PNAS 17,
    1931). At the customary 5 % the test would miss most: three repeats a level have little power, and what is asked is
    which of two intervals is safer (Bancroft, Annals of Mathematical Statistics 15, 1944).
    """
    known = [each for each in spreads if each.df]
    noise = pooled(known)
    if len(known) < 2 or noise is None or not noise.sd:
        return True
    if not all(each.squares for each in known):
        return False
    others = len(known) - 1
    statistic = noise.df * math.log(noise.sd**2) - math.fsum(e.df * math.log(e.squares / e.df) for e in known)
    correction = 1 + (math.fsum(1 / e.df for e in known) - 1 / noise.df) / (3 * others)
    return statistic / correction <= others * (1 - 2 / (9 * others)) ** 3


def noise_of(own: Spread, every: Sequence[Spread]) -> Noise | None:
    """Return the noise of what `own`, one of `every`, is the spread of: the pool's, unless it scatters more.

    Where not all scatter alike, its own variance, with one degree of freedom lent by the pool, is taken if that makes
    the wider interval. The weight was chosen by simulation (`benchmarks/knee_truth.py`): a level with 1.5 times the
    usual noise is still covered as promised, and equal noise costs little.
    """
    pool = pooled(every)
    if pool is None or not own.df or scatter_alike(every):
        return pool
    alone = Noise(math.sqrt((own.squares + pool.sd**2) / (own.df + 1)), own.df + 1)
    return max(pool, alone, key=lambda noise: noise.margin(1.0, (1 - CONFIDENCE) / 2))


def of_difference(one: Noise, repeats: int, other: Noise, other_repeats: int) -> Noise:
    """Return the standard error of the difference of two levels' mean logarithms, with its degrees of freedom.

    Where the two noises are one estimate, its own; else Welch's approximation (Biometrika 34, 1947), rounded down.
    """
    parts = one.sd**2 / repeats, other.sd**2 / other_repeats
    if one == other or not all(parts):
        return Noise(math.sqrt(sum(parts)), min(one.df, other.df))
    df = sum(parts) ** 2 / (parts[0] ** 2 / one.df + parts[1] ** 2 / other.df)
    return Noise(math.sqrt(sum(parts)), int(df))


@cache
def t_quantile(probability: float, df: int) -> float:
    """Return Student's t below which `probability` (0.5 to 1) of the distribution with `df` >= 1 degrees lies."""
    if not 0.5 <= probability < 1 or df < 1:
        raise ValueError(f"no t quantile at probability {probability} and {df} degrees of freedom")
    low, high = 0.0, 1.0
    while _t_between(high, df) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_between(middle, df) < 2 * probability - 1 else (low, middle)
    return high


def _t_between(t: float, df: int) -> float:
    """Return the probability between -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4: finite sums for whole df)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    if df % 2 == 0:
        factors = ((2 * k - 1) / (2 * k) * cosine**2 for k in range(1, df // 2))
        return sine * math.fsum(accumulate(factors, mul, initial=1.0))
    if df == 1:
        return 2 * angle / math.pi
    factors = (2 * k / (2 * k + 1) * cosine**2 for k in range(1, (df - 1) // 2))
    return 2 / math.pi * (angle + sine * math.fsum(accumulate(factors, mul, initial=cosine)))
