"""The statistics behind every table: lines and medians."""

import math

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis.numbers import statistics as stats

numbers = st.floats(-1e9, 1e9, allow_nan=False, allow_infinity=False)
positive = st.floats(1e-3, 1e6, allow_nan=False)
lengths = st.lists(st.integers(1, 1_000_000), min_size=2, max_size=8, unique=True)


@given(lengths, st.floats(1, 1e7), st.floats(0, 1e11))
def test_exact_line_of_byte_counts_is_recovered(x: list[int], slope: float, intercept: float) -> None:
    fit = stats.linear_fit(x, [intercept + slope * value for value in x])
    assert fit is not None
    assert math.isclose(fit.slope, slope, rel_tol=1e-6, abs_tol=intercept * 1e-9)
    assert fit.max_residual <= 1e-6 * (intercept + slope * max(x))


@given(st.lists(st.tuples(st.integers(0, 1000), numbers), min_size=3, max_size=12))
def test_fit_agrees_with_numpy(points: list[tuple[int, float]]) -> None:
    x, y = [float(p[0]) for p in points], [p[1] for p in points]
    assume(len(set(x)) > 1)
    fit = stats.linear_fit(x, y)
    assert fit is not None
    slope, intercept = np.polyfit(x, y, 1)
    scale = max(map(abs, y)) + 1
    assert math.isclose(
        fit.intercept + fit.slope * 500, intercept + slope * 500, rel_tol=1e-6, abs_tol=1e-6 * scale * 1000
    )


def test_no_line_through_one_length() -> None:
    assert stats.linear_fit([512, 512], [1, 2]) is None


def test_r_squared_of_flat_memory_is_unknown() -> None:
    fit = stats.linear_fit([1, 2, 3], [5, 5, 5])
    assert fit is not None
    assert fit.r_squared is None
    assert fit.slope == 0


@given(st.lists(numbers, min_size=1))
def test_median_agrees_with_numpy(values: list[float]) -> None:
    assert math.isclose(stats.median(values), float(np.median(values)), rel_tol=1e-12, abs_tol=1e-3)


def test_median_of_infinite_bounds_is_infinite() -> None:
    assert stats.median([0.3, math.inf, math.inf, math.inf]) == math.inf
    assert stats.median([0.3, math.inf]) == math.inf


@given(st.lists(positive, min_size=2, max_size=6))
def test_spread_is_a_share_of_the_median(values: list[float]) -> None:
    assert math.isclose(
        stats.spread(values) or 0.0, (max(values) - min(values)) / float(np.median(values)), rel_tol=1e-9
    )


@given(lengths, st.floats(1, 1e6), st.integers(1, 2_000_000))
def test_interpolation_keeps_a_proportional_cost(known: list[int], rate: float, at: int) -> None:
    value = stats.interpolate([(x, rate * x) for x in known], at, rate)
    assert math.isclose(value, rate * at, rel_tol=1e-9)
