"""The statistics behind every table: lines, medians, knees."""

import math

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis import statistics as stats

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


@given(st.lists(st.tuples(st.integers(1, 512), positive), min_size=1, unique_by=lambda level: level[0]))
def test_plateau_is_the_lowest_level_near_the_peak(levels: list[tuple[int, float]]) -> None:
    found = stats.plateau(levels, 0.05)
    peak = max(value for _, value in levels)
    assert dict(levels)[found or 0] >= 0.95 * peak
    assert all(value < 0.95 * peak for level, value in levels if level < (found or 0))


def test_plateau_of_nothing_is_unknown() -> None:
    assert stats.plateau([], 0.05) is None


@given(st.lists(st.integers(1, 512), min_size=2, unique=True), positive)
def test_latency_never_overtakes_perfect_scaling(levels: list[int], latency: float) -> None:
    assert stats.overtake([(level, 10.0 * level, latency) for level in levels]) is None


@given(st.lists(st.integers(1, 512), min_size=2, unique=True), positive)
def test_latency_overtakes_at_once_when_throughput_is_flat(levels: list[int], latency: float) -> None:
    assert stats.overtake([(level, 10.0, latency * level) for level in levels]) == sorted(levels)[1]


@given(st.lists(st.integers(1, 512), min_size=3, unique=True), st.data())
def test_latency_that_falls_again_has_not_overtaken(levels: list[int], data: st.DataObject) -> None:
    spike = data.draw(st.sampled_from(sorted(levels)[:-1]))
    noisy = [(level, 10.0 * level, 50.0 if level == spike else 0.5) for level in levels]
    assert stats.overtake(noisy) is None


def test_latency_that_stays_up_overtakes_where_it_rose_for_good() -> None:
    latency = {1: 0.5, 2: 3.0, 4: 0.6, 8: 2.0, 16: 1.9, 32: 4.0}
    assert stats.overtake([(level, 100.0 * level, value) for level, value in latency.items()]) == 8


def test_throughput_that_dips_is_no_latency_that_grows() -> None:
    assert stats.overtake([(1, 100.0, 0.5), (2, 90.0, 0.5), (4, 300.0, 0.4)]) is None


@given(st.lists(positive, min_size=2, max_size=6))
def test_spread_is_a_share_of_the_median(values: list[float]) -> None:
    assert math.isclose(
        stats.spread(values) or 0.0, (max(values) - min(values)) / float(np.median(values)), rel_tol=1e-9
    )


@given(lengths, st.floats(1, 1e6), st.integers(1, 2_000_000))
def test_interpolation_keeps_a_proportional_cost(known: list[int], rate: float, at: int) -> None:
    value = stats.interpolate([(x, rate * x) for x in known], at, rate)
    assert math.isclose(value, rate * at, rel_tol=1e-9)
