"""What a histogram's buckets can say, and no more."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.histogram import Histogram, gained

SECONDS = st.floats(0.0, 100.0)
BOUNDS = st.lists(SECONDS, unique=True, max_size=8)


def observed(values: list[float], bounds: list[float]) -> Histogram:
    """Return the histogram of a server that has seen these values."""
    buckets = {bound: sum(value <= bound for value in values) for bound in (*sorted(bounds), math.inf)}
    return Histogram(math.fsum(values), len(values), buckets)


def test_what_was_seen_before_the_window_is_not_in_it() -> None:
    bounds = [0.3, 0.5, 1.0]
    window = gained(observed([9.0] * 40, bounds), observed([9.0] * 40 + [0.2, 0.4], bounds))
    assert window.count == 2
    assert window.mean == pytest.approx(0.3)
    assert window.percentile_le(95) == 0.5
    assert window.percentile_le(50) == 0.3
    assert window.highest_above() == 0.3


def test_nothing_observed_has_neither_mean_nor_percentile() -> None:
    some = observed([1.0], [0.3])
    for none in (gained(some, some), gained(None, None), gained(some, None)):
        assert (none.mean, none.percentile_le(95), none.highest_above()) == (None, None, None)


def test_a_metric_that_was_not_there_before_began_at_nothing() -> None:
    assert gained(None, observed([1.0, 3.0], [2.0])).mean == 2.0


def test_beyond_the_last_bucket_there_is_no_bound() -> None:
    many = observed([0.1] * 94 + [7.0] * 6, [0.3, 5.0])
    assert many.percentile_le(94) == 0.3
    assert many.percentile_le(95) == math.inf
    assert many.highest_above() == 5.0
    assert Histogram(3.0, 2).percentile_le(95) == math.inf


def test_a_share_that_is_just_reached_is_reached() -> None:
    for hundreds in range(1, 60):
        values = [0.1] * 95 * hundreds + [9.0] * 5 * hundreds
        assert observed(values, [0.3, 10.0]).percentile_le(95) == 0.3


@given(st.lists(SECONDS, max_size=40), st.lists(SECONDS, min_size=1, max_size=40), BOUNDS, st.integers(1, 100))
def test_a_percentiles_bound_holds_its_share_and_no_lower_bound_does(
    earlier: list[float], window: list[float], bounds: list[float], percent: int
) -> None:
    bound = gained(observed(earlier, bounds), observed(earlier + window, bounds)).percentile_le(percent)
    assert bound is not None
    assert 100 * sum(value <= bound for value in window) >= percent * len(window)
    for lower in (b for b in bounds if b < bound):
        assert 100 * sum(value <= lower for value in window) < percent * len(window)


@given(st.lists(SECONDS, min_size=1, max_size=40), BOUNDS)
def test_the_highest_value_lies_in_the_last_bucket_that_gained(values: list[float], bounds: list[float]) -> None:
    above = observed(values, bounds).highest_above()
    assert above is not None
    assert max(values) > above or above == 0
    assert not any(above < bound < max(values) for bound in bounds)
