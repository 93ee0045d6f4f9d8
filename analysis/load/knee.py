"""Where throughput stops scaling and where latency blows up: the rule, its parameters, what noise leaves open. Pure.

The rule in words stands in docs/definitions.md and, with the same parameters, on the page (`knee_sentences`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise

from analysis.numbers.intervals import CONFIDENCE, Noise, mean_log

WITHIN_PEAK = 0.05
"""The knee is the lowest level whose smoothed tok/s is within this share of the highest (tutorial: 5 to 10 %)."""
STILL_GAINS = 0.10
"""There is no knee yet where the last doubling of the load still gains more than this share of tok/s."""

RESOLUTION = 1.1
"""The range in which a knee lies is narrow enough once its ends are within this factor, or are neighbouring numbers:
there the searches end."""

_BAND = -math.log(1 - WITHIN_PEAK)
_SEARCH_STEPS = 48
_ROUNDING = 1e-12
"""Of a squared logarithm: equal repeats have no noise, and sums of equal numbers differ in the last digits."""


@dataclass(frozen=True, slots=True)
class Level:
    """The repeats at one level of load, in pairs; at least one, all numbers > 0."""

    at: float
    """A concurrency, or the arrival rate of an open loop, which need not be whole."""
    tok_s: tuple[float, ...]
    p95_s: tuple[float, ...]

    @property
    def repeats(self) -> int:
        """How many there are."""
        return len(self.tok_s)

    @property
    def waiting_per_work(self) -> tuple[float, ...]:
        """p95 over tok/s of each repeat: the inverse of Kleinrock's power."""
        return tuple(p95 / tok_s for p95, tok_s in zip(self.p95_s, self.tok_s, strict=True))


class KneeVerdict(StrEnum):
    """What a curve says about its knee."""

    KNEE = "knee"
    NO_KNEE_YET = "no knee yet"
    UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Gain:
    """A relative gain of tok/s (0.1 is 10 %) and its bounds, each with one-sided 95 %; without noise there are none."""

    share: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Knee:
    """The verdict on a curve, and the levels that may be the knee: none unless the verdict is that there is one."""

    verdict: KneeVerdict
    could_be: tuple[float, ...] = ()
    """Ascending: all levels that the noise allows."""
    doubling: Gain | None = None
    """What the last doubling of the load gained; None where the levels do not span one."""
    if_any: tuple[float, ...] = ()
    """Ascending: where noise leaves open whether there is a knee, all levels that it could be if there is."""
    above: float | None = None
    """The level next below those that could be it; None without a knee, or a lower level. Of all numbers, tested or
    not, the knee lies above it and up to the highest that could be it, unless an untested one gives more than any
    tested."""

    @property
    def may_rise(self) -> bool:
        """Whether there is a knee, yet the last doubling may have gained more than its band: then levels above those
        tested may give so much more that by them the knee lies higher."""
        high = None if self.doubling is None else self.doubling.high
        return bool(self.could_be) and high is not None and high > WITHIN_PEAK

    def untested(self, levels: Iterable[float]) -> tuple[tuple[int, int], ...]:
        """Return the first and the last of all whole numbers in a row that could be the knee, too, had they been among
        the levels tested."""
        if not self.could_be:
            return ()
        above = self.above or 0
        edges = [above, *sorted(at for at in levels if above < at <= self.could_be[-1])]
        return tuple((int(low) + 1, int(high) - 1) for low, high in pairwise(edges) if high - low > 1)

    def __post_init__(self) -> None:
        if bool(self.could_be) != (self.verdict is KneeVerdict.KNEE):
            raise ValueError(f"{self.verdict}, yet the knee is one of {self.could_be}")


@dataclass(frozen=True, slots=True)
class BlowUp:
    """From where on p95 outgrows throughput."""

    last_before: tuple[float, ...]
    """Ascending: the levels that may be the last before it."""
    highest: float
    """The highest level measured."""

    @property
    def seen(self) -> bool | None:
        """True: it begins below the highest level. False: not within the levels. None: the noise allows both."""
        if self.highest not in self.last_before:
            return True
        return False if len(self.last_before) == 1 else None


@lru_cache(maxsize=256)
def find_knee(levels: tuple[Level, ...], noise: Noise | None) -> Knee:
    """Return the knee of levels in ascending order; `noise` is that of tok/s.

    A likelihood-ratio test under order restrictions (Robertson, Wright and Dykstra, Order Restricted Statistical
    Inference, 1988): a level could be the knee where the nearest rising-and-falling curve with its knee there is not
    significantly further from the means than the nearest such curve of all. Without noise, or where the gain of the
    last doubling is within noise of `STILL_GAINS` (one-sided: either verdict errs in one direction only), the verdict
    is undecided.
    """
    doubling = last_doubling(levels, noise)
    if doubling is None or noise is None or doubling.low is None or doubling.high is None:
        return Knee(KneeVerdict.UNDECIDED, doubling=doubling)
    if doubling.low > STILL_GAINS:
        return Knee(KneeVerdict.NO_KNEE_YET, doubling=doubling)
    if doubling.high > STILL_GAINS:
        return Knee(KneeVerdict.UNDECIDED, doubling=doubling, if_any=_could_be(levels, noise))
    could_be = _could_be(levels, noise)
    below = [level.at for level in levels if level.at < could_be[0]]
    return Knee(KneeVerdict.KNEE, could_be, doubling, above=max(below, default=None))


def _could_be(levels: tuple[Level, ...], noise: Noise) -> tuple[float, ...]:
    """Return the levels that the noise allows to be the lowest within the band of the highest."""
    means, weights = [mean_log(level.tok_s) for level in levels], [float(level.repeats) for level in levels]
    nearest = _squares(means, weights, _rising_and_falling(means, weights))
    allowed = noise.margin(1.0, 1 - CONFIDENCE) ** 2 + _ROUNDING
    return tuple(
        level.at for i, level in enumerate(levels) if _squares_with_knee(means, weights, i) - nearest <= allowed
    )


def last_doubling(levels: Sequence[Level], noise: Noise | None) -> Gain | None:
    """Return what tok/s gained from half the highest level to the highest; None where half lies below the lowest.

    Where half the level was not measured, its tok/s lies on the line between its neighbours, both axes logarithmic.
    """
    if len(levels) < 2 or 2 * levels[0].at > levels[-1].at:
        return None
    half = levels[-1].at / 2
    above = next(i for i, level in enumerate(levels) if level.at >= half and i > 0)
    below = above - 1
    share = math.log(half / levels[below].at) / math.log(levels[above].at / levels[below].at)
    factors = [0.0] * len(levels)
    factors[-1] = 1.0
    factors[above] -= share
    factors[below] -= 1 - share
    gain = math.fsum(f * mean_log(level.tok_s) for f, level in zip(factors, levels, strict=True))
    if noise is None:
        return Gain(math.expm1(gain))
    variance_of_one = math.fsum(f * f / level.repeats for f, level in zip(factors, levels, strict=True))
    margin = noise.margin(variance_of_one, 1 - CONFIDENCE)
    return Gain(math.expm1(gain), math.expm1(gain - margin), math.expm1(gain + margin))


@lru_cache(maxsize=256)
def find_blow_up(levels: tuple[Level, ...], noise: Noise | None) -> BlowUp | None:
    """Return where p95 begins to outgrow throughput for good; `noise` is that of p95 over tok/s.

    That is past the level with the lowest p95 over tok/s, Kleinrock's highest power (ICC 1979): every higher level has
    paid for its tok/s with a larger factor of p95. A level could be the lowest where none is significantly lower
    (multiple comparisons with the best: Hsu, Annals of Statistics 12, 1984, here with pairwise t). None without noise
    or with fewer than two levels.
    """
    if noise is None or len(levels) < 2:
        return None
    means = [mean_log(level.waiting_per_work) for level in levels]

    def could_be_lowest(i: int) -> bool:
        return all(
            means[i] - means[j] <= noise.margin(1 / levels[i].repeats + 1 / levels[j].repeats, (1 - CONFIDENCE) / 2)
            for j in range(len(levels))
            if j != i
        )

    return BlowUp(tuple(level.at for i, level in enumerate(levels) if could_be_lowest(i)), levels[-1].at)


def smoothed(levels: Sequence[Level]) -> list[float]:
    """Return tok/s of the nearest curve that rises up to some level and falls from there on, level by level."""
    if not levels:
        return []
    means, weights = [mean_log(level.tok_s) for level in levels], [float(level.repeats) for level in levels]
    return [math.exp(value) for value in _rising_and_falling(means, weights)]


def read_off(levels: Sequence[Level]) -> float | None:
    """Return the lowest level within the band of the smoothed values as they stand; None without levels.

    Noise is left out: an observation about what was measured, not a knee.
    """
    values = smoothed(levels)
    return next(
        (level.at for level, v in zip(levels, values, strict=True) if v >= (1 - WITHIN_PEAK) * max(values)), None
    )


def marginal_tok_s_per_s(lower: Level, upper: Level, p95_noise: Noise | None) -> float | None:
    """Return what each further second of p95 bought between two levels, in tok/s (geometric means of the repeats).

    None where p95 did not rise, or by no more than its noise: a ratio to next to nothing says nothing.
    """
    low, high = mean_log(lower.p95_s), mean_log(upper.p95_s)
    margin = 0.0 if p95_noise is None else p95_noise.margin(1 / lower.repeats + 1 / upper.repeats, 1 - CONFIDENCE)
    if high - low <= margin:
        return None
    gain = math.exp(mean_log(upper.tok_s)) - math.exp(mean_log(lower.tok_s))
    return gain / (math.exp(high) - math.exp(low))


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the nearest non-decreasing values: weighted least squares by pooling adjacent violators (Barlow 1972)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            before, weight_before, size_before = blocks.pop()
            total = weight_before + block[1]
            block = ((before * weight_before + block[0] * block[1]) / total, total, size_before + block[2])
        blocks.append(block)
    return [value for value, _, size in blocks for _ in range(size)]


def _falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    return rising(values[::-1], weights[::-1])[::-1]


def _squares(values: Sequence[float], weights: Sequence[float], fit: Sequence[float]) -> float:
    return math.fsum(w * (v - f) ** 2 for v, w, f in zip(values, weights, fit, strict=True))


def _rising_and_falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the nearest unimodal values (Frisén, The Statistician 35, 1986): the best of the fits with each peak."""
    fits = [
        [*rising(values[:cut], weights[:cut]), *_falling(values[cut:], weights[cut:])]
        for cut in range(1, len(values) + 1)
    ]
    return min(fits, key=lambda fit: _squares(values, weights, fit))


def _squares_with_knee(values: Sequence[float], weights: Sequence[float], knee: int) -> float:
    """Return the squared distance to the nearest unimodal curve whose lowest level within the band is `knee`."""
    return min(_squares_with_peak(values, weights, knee, peak) for peak in range(knee, len(values)))


def _squares_with_peak(values: Sequence[float], weights: Sequence[float], knee: int, peak: int) -> float:
    """Return the same with the curve's peak given: levels below the knee stay below the band, the others under the top.

    The nearest monotone values between bounds are the nearest monotone values, cut at the bounds.
    """
    below = rising(values[:knee], weights[:knee])
    shoulder = rising(values[knee:peak], weights[knee:peak])
    beyond = _falling(values[peak + 1 :], weights[peak + 1 :])

    def squares(top: float) -> float:
        floor = top - _BAND
        fit = [min(v, floor) for v in below]
        fit += [min(max(v, floor), top) for v in shoulder]
        fit += [top, *(min(v, top) for v in beyond)]
        return _squares(values, weights, fit)

    return _lowest(squares, min(values), max(values) + _BAND)


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the lowest value of a convex function between two places (golden section)."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_SEARCH_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return min(at_left, at_right)
