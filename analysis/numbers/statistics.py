"""Statistics that the artifacts rest on: pure functions of numbers, no rows, no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class LinearFit:
    """Least-squares line y = intercept + slope * x."""

    slope: float
    intercept: float
    r_squared: float | None
    """1 - residual sum of squares / total sum of squares; None when all y are equal."""
    max_residual: float
    """Largest |y - (intercept + slope * x)|, in the unit of y."""
    points: int


def median(values: Sequence[float]) -> float:
    """Return the median (mean of the middle two for an even count); `values` must not be empty."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    below, above = ordered[middle - 1], ordered[middle]
    return below if below == above else below + (above - below) / 2  # two infinite ones have no difference


def spread(values: Sequence[float]) -> float | None:
    """Return (largest - smallest) / median, or None for fewer than two values or a median of zero."""
    if len(values) < 2 or not median(values):
        return None
    return (max(values) - min(values)) / median(values)


def linear_fit(x: Sequence[float], y: Sequence[float]) -> LinearFit | None:
    """Return the ordinary least-squares line through the points, or None with fewer than two different x.

    Computed on centred values, so that byte counts of 1e11 do not cancel.
    """
    if len(x) != len(y):
        raise ValueError("x and y differ in length")
    if len(set(x)) < 2:
        return None
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread_x = math.fsum((a - mean_x) ** 2 for a in x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread_x
    residuals = [(b - mean_y) - slope * (a - mean_x) for a, b in zip(x, y, strict=True)]
    total = math.fsum((b - mean_y) ** 2 for b in y)
    r_squared = 1 - math.fsum(r * r for r in residuals) / total if total else None
    return LinearFit(slope, mean_y - slope * mean_x, r_squared, max(abs(r) for r in residuals), len(x))


def relative_error(value: float, reference: float) -> float | None:
    """Return value / reference - 1, or None for a reference of zero."""
    return value / reference - 1 if reference else None


def interpolate(known: Sequence[tuple[float, float]], x: float, slope_beyond: float) -> float:
    """Return y at `x`: on lines between known points, `slope_beyond` past the last, proportional before the first."""
    ordered = sorted(known)
    first_x, first_y = ordered[0]
    if x <= first_x:
        return first_y * x / first_x
    for (left_x, left_y), (right_x, right_y) in pairwise(ordered):
        if x <= right_x:
            return left_y + (right_y - left_y) * (x - left_x) / (right_x - left_x)
    last_x, last_y = ordered[-1]
    return last_y + slope_beyond * (x - last_x)
