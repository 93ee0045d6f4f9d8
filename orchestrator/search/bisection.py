"""Halving a bracket on a logarithmic scale, and going up from its end. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context
from itertools import pairwise

from analysis.load.knee import RESOLUTION

RATE_DIGITS = 3
"""Significant digits of a rate that a search asks for."""


def whole_between(low: float, high: float) -> int | None:
    """Return a whole number near the geometric mean of two whole ones, or None where the bracket is narrow enough."""
    if high <= RESOLUTION * low or high - low < 2:
        return None
    return int(min(max(round(math.sqrt(low * high)), low + 1), high - 1))


def rate_between(low: float, high: float) -> float | None:
    """Return a number near the geometric mean, or None where the bracket is narrow enough."""
    if high <= RESOLUTION * low:
        return None
    return float(f"{math.sqrt(low * high):.{RATE_DIGITS}g}")


def outer_brackets(levels: Sequence[float], measured: Container[float]) -> list[tuple[float, float]]:
    """Return the lowest and the highest bracket of ascending levels that has an end which was measured.

    Halving these narrows a range from its ends; between two levels that could not be measured nothing is known to lie.
    """
    brackets = [(low, high) for low, high in pairwise(levels) if low in measured or high in measured]
    return [*brackets[:1], *brackets[-1:]]


def whole_within(low: float, factor: float) -> int:
    """Return the highest whole number within `factor` of a whole one, the next one at least."""
    return max(int(factor * low), int(low) + 1)


def rate_within(low: float, factor: float) -> float:
    """Return the highest rate that a search asks for within `factor` (`RESOLUTION` or more) of a number."""
    return float(Context(prec=RATE_DIGITS, rounding=ROUND_FLOOR).create_decimal_from_float(factor * low))


@dataclass(frozen=True, slots=True)
class Scale:
    """How a search moves along an axis of levels."""

    between: Callable[[float, float], float | None]
    """A level near the middle of a bracket; None where the bracket is narrow enough."""
    within: Callable[[float, float], float]
    """The highest level above one, within a factor of it."""


WHOLE = Scale(whole_between, whole_within)
RATES = Scale(rate_between, rate_within)


def doublings(lowest: float, highest: float) -> tuple[float, ...]:
    """Return lowest, twice, four times … as much, and last the highest."""
    levels = [lowest]
    while levels[-1] < highest:
        levels.append(min(2 * levels[-1], highest))
    return tuple(levels)


def halvings() -> int:
    """Return how often a bracket of two neighbouring doublings is halved until it is narrow enough."""
    return math.ceil(math.log2(math.log(2) / math.log(RESOLUTION)))
