"""Whether readings of one level, in their order, moved by more than noise: a step or a trend. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeAlias

from analysis.numbers.intervals import CONFIDENCE, Spread, pooled

DRIFT_LIMIT = 0.05
"""A server drifted where its anchor moved by more than this share of tok_s, and by more than noise."""
ROUNDING = 1e-9
"""Of logarithms: readings that are all alike differ by this."""


@dataclass(frozen=True, slots=True)
class Drift:
    """The clearest move of an anchor's readings: from before to after a step, or along a line from first to last."""

    share: float
    """Relative change: 0.1 is 10 %."""
    low: float | None = None
    """Of its interval, which holds for all moves that were tried together; None where no noise is known."""
    high: float | None = None

    @property
    def told(self) -> bool:
        """Whether it is more than noise."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @property
    def drifted(self) -> bool:
        """Whether it is more than noise and past `DRIFT_LIMIT`."""
        return self.told and abs(self.share) > DRIFT_LIMIT

    @property
    def clearness(self) -> float:
        """How often its interval's half width fits into it; where no noise is known, the change alone."""
        if self.low is None or self.high is None:
            return abs(self.share)
        return abs(math.log1p(self.share)) * 2 / (math.log1p(self.high) - math.log1p(self.low))

    @property
    def furthest(self) -> float:
        """The largest change that the noise allows; the change itself where no noise is known."""
        return max((bound for bound in (self.low, self.high) if bound is not None), key=abs, default=self.share)


@dataclass(frozen=True, slots=True)
class Timed:
    """A repeat of a level (value > 0) and when it began, in seconds."""

    at_s: float
    value: float


def find_drift(readings: Sequence[Timed], others: Sequence[Sequence[Timed]]) -> Drift | None:
    """Return the clearest move of readings, the largest in units of its noise; None for fewer than two.

    `readings` in the order of their times. Tried are a line in time and, from three readings on, a step after each but
    the last, each by t with its own residuals. Those of `others`, the repeats of the session's other levels, are pooled
    with them: less each level's mean and the same move, so that a drift is not taken for noise. Each interval is
    Bonferroni's for as many as are tried (Dunn, Journal of the American Statistical Association 56, 1961), so of 20
    servers that do not drift one at most is said to, where the anchor scatters as the other levels do; where it
    scatters more, more are (`benchmarks/drift_truth.py`). Few readings cannot tell: `intervals.noise_of` would mark too
    many of those still, and miss more true drifts.
    """
    times = [reading.at_s for reading in readings]
    courses: list[Course] = [partial(_line, times[0], times[-1])] if len(set(times)) > 1 else []
    if len(times) > 2:
        courses += [partial(_step, before, after) for before, after in pairwise(times) if before < after]
    tail = (1 - CONFIDENCE) / 2 / max(len(courses), 1)
    moves = [_move(readings, others, course, tail) for course in courses]
    return max(moves, key=lambda move: move.clearness, default=None)


Course: TypeAlias = Callable[[float], float | None]
"""How much of a move has happened at a time, 0 to 1; None where that is not known."""


def _step(before: float, after: float, at: float) -> float | None:
    return 0.0 if at <= before else 1.0 if at >= after else None


def _line(first: float, last: float, at: float) -> float:
    return (at - first) / (last - first)


def _move(readings: Sequence[Timed], others: Sequence[Sequence[Timed]], course: Course, tail: float) -> Drift:
    fit = _fit([readings], course)
    noise = pooled((fit.left, _fit(others, course).left))
    if noise is None:
        return Drift(math.expm1(fit.slope))
    margin = noise.margin(1 / fit.across, tail) + ROUNDING
    return Drift(math.expm1(fit.slope), math.expm1(fit.slope - margin), math.expm1(fit.slope + margin))


@dataclass(frozen=True, slots=True)
class _Fit:
    """Least squares of the logarithms of levels on a mean each and one course for all."""

    slope: float
    across: float
    """Sum of squares of the course about its mean in each level."""
    left: Spread


def _fit(levels: Sequence[Sequence[Timed]], course: Course) -> _Fit:
    pairs = []
    df = -1
    for level in levels:
        known = [(x, math.log(each.value)) for each in level if (x := course(each.at_s)) is not None]
        middle, mean = (math.fsum(column) / len(known) for column in zip(*known, strict=True)) if known else (0.0, 0.0)
        pairs += [(x - middle, y - mean) for x, y in known]
        df += max(len(known) - 1, 0)
    across = math.fsum(x * x for x, _ in pairs)
    slope = math.fsum(x * y for x, y in pairs) / across if across else 0.0
    return _Fit(slope, across, Spread(math.fsum((y - slope * x) ** 2 for x, y in pairs), max(df, 0)))
