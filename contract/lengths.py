"""Lengths in tokens that differ from request to request. Pure: a length follows from seed and number, in any process.

A fixed length is a plain int. Planner, load processes and rows share this.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import TypeAlias

LEAST_SHARE = 2.0**-53


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every whole number of tokens from `low` to `high` is as likely as any other.

    Raises:
        ValueError: the bounds are below 1 or the wrong way round.
    """

    low: int
    high: int
    kind: str = field(default="uniform", init=False)

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high)

    def __str__(self) -> str:
        return f"uniform from {self.low} to {self.high}"

    @property
    def expected(self) -> float:
        """Mean of what is drawn."""
        return (self.low + self.high) / 2

    def at(self, share: float) -> int:
        """Return the length below which `share` (0 to 1, exclusive) of all lengths lie."""
        return self.low + int(share * (self.high - self.low + 1))


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution, cut to `low` to `high` as if what falls outside were drawn again.

    Drawn again, not clipped: clipping would heap lengths up at both ends. So `expected` is not quite `mean` where the
    bounds cut unevenly.

    Raises:
        ValueError: the bounds are below 1 or the wrong way round, `mean` is outside them, or `std` is not above 0.
    """

    mean: float
    """Before the cut."""
    std: float
    """Standard deviation before the cut."""
    low: int
    high: int
    kind: str = field(default="normal", init=False)

    def __post_init__(self) -> None:
        _check_bell(self.mean, self.std, self.low, self.high)

    def __str__(self) -> str:
        return _bell_words(self)

    @property
    def expected(self) -> float:
        """Mean of what is drawn. Source: Johnson, Kotz, Balakrishnan, Continuous Univariate Distributions 1, ch. 13."""
        whole, low, high = self._whole, self.low - 0.5, self.high + 0.5
        held = whole.cdf(high) - whole.cdf(low)
        return self.mean + self.std**2 * (whole.pdf(low) - whole.pdf(high)) / held

    def at(self, share: float) -> int:
        """Return the length below which `share` (0 to 1, exclusive) of all lengths lie."""
        return _whole_number(_cut_at(self._whole, self.low - 0.5, self.high + 0.5, share), self.low, self.high)

    @property
    def _whole(self) -> NormalDist:
        return NormalDist(self.mean, self.std)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A lognormal distribution whose own mean and deviation are given (not its logarithm's), cut as `Normal` is.

    Raises:
        ValueError: as `Normal`.
    """

    mean: float
    """Of the tokens, before the cut."""
    std: float
    """Standard deviation of the tokens, before the cut."""
    low: int
    high: int
    kind: str = field(default="lognormal", init=False)

    def __post_init__(self) -> None:
        _check_bell(self.mean, self.std, self.low, self.high)

    def __str__(self) -> str:
        return _bell_words(self)

    @property
    def expected(self) -> float:
        """Mean of what is drawn. Source: as for `Normal`, chapter 14."""
        logs = self._logs
        shifted = NormalDist(logs.mean + logs.variance, logs.stdev)
        low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
        return self.mean * (shifted.cdf(high) - shifted.cdf(low)) / (logs.cdf(high) - logs.cdf(low))

    def at(self, share: float) -> int:
        """Return the length below which `share` (0 to 1, exclusive) of all lengths lie."""
        log = _cut_at(self._logs, math.log(self.low - 0.5), math.log(self.high + 0.5), share)
        return _whole_number(math.exp(log), self.low, self.high)

    @property
    def _logs(self) -> NormalDist:
        variance = math.log1p((self.std / self.mean) ** 2)
        return NormalDist(math.log(self.mean) - variance / 2, math.sqrt(variance))


Drawn: TypeAlias = Uniform | Normal | LogNormal
Lengths: TypeAlias = int | Drawn


def draw(lengths: Lengths, what: str, seed: int, number: int) -> int:
    """Return the length of the `number`-th request of a level; `what` keeps its prompt's apart from its answer's."""
    if isinstance(lengths, int):
        return lengths
    return lengths.at(random.Random(f"{what}:{seed}:{number}").random())


def lowest(lengths: Lengths) -> int:
    """Return the shortest length that can be drawn."""
    return lengths if isinstance(lengths, int) else lengths.low


def highest(lengths: Lengths) -> int:
    """Return the longest length that can be drawn."""
    return lengths if isinstance(lengths, int) else lengths.high


def expected(lengths: Lengths) -> float:
    """Return the mean of what is drawn."""
    return lengths if isinstance(lengths, int) else lengths.expected


def words(lengths: Lengths) -> str | None:
    """Return the distribution in words; None for a fixed length."""
    return None if isinstance(lengths, int) else str(lengths)


def _check_bounds(low: int, high: int) -> None:
    if low < 1:
        raise ValueError(f"low is {low}: must be at least 1")
    if high < low:
        raise ValueError(f"low {low} is above high {high}")


def _check_bell(mean: float, std: float, low: int, high: int) -> None:
    _check_bounds(low, high)
    if not low <= mean <= high:
        raise ValueError(f"mean {mean:g} is not within low {low} and high {high}")
    if not 0 < std < math.inf:
        raise ValueError(f"std is {std:g}: must be above 0")


def _bell_words(bell: Normal | LogNormal) -> str:
    return f"{bell.kind} of mean {bell.mean:g} and std {bell.std:g} from {bell.low} to {bell.high}"


def _cut_at(whole: NormalDist, low: float, high: float, share: float) -> float:
    """The value below which `share` of `whole` lies where only what is between `low` and `high` counts."""
    below, above = whole.cdf(low), whole.cdf(high)
    return whole.inv_cdf(min(max(below + share * (above - below), LEAST_SHARE), 1 - LEAST_SHARE))


def _whole_number(value: float, low: int, high: int) -> int:
    return min(max(round(value), low), high)
