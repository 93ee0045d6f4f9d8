"""What a level's row says of its load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.arrivals import ArrivalProcess, Arrivals, Stage
from contract.rows import TelemetryRow
from workers.point_rows import offered_qps, power_w


@given(st.floats(0.5, 100), st.floats(5, 60))
def test_constant_arrivals_offer_just_their_rate(rate: float, seconds: float) -> None:
    """Ten requests at 0, 1, ... 9 s are one a second, not 1.11."""
    arrivals = Arrivals(ArrivalProcess.CONSTANT, rate, (Stage(seconds),))
    assert offered_qps(arrivals, arrivals.times(arrivals.requests, "")) == pytest.approx(rate)


def test_drawn_arrivals_begin_with_a_gap() -> None:
    assert offered_qps(Arrivals(ArrivalProcess.POISSON, 1.0, (Stage(4),)), [0.5, 1.0, 3.0, 4.0]) == 1.0


def test_one_request_at_once_has_no_rate() -> None:
    assert offered_qps(Arrivals(ArrivalProcess.CONSTANT, 1.0, (Stage(1),)), [0.0]) is None


def watts(**by_card: list[float | None]) -> list[TelemetryRow]:
    return [
        TelemetryRow(at / 10, card, power_w=power)
        for card, powers in by_card.items()
        for at, power in enumerate(powers)
    ]


def test_power_is_the_sum_of_the_cards_means() -> None:
    assert power_w(watts(a=[300.0, 320.0], b=[500.0, 540.0]), ["a", "b"]) == 310 + 520
    assert power_w(watts(a=[300.0, None], b=[500.0, 540.0]), ["a", "b"]) == 300 + 520  # one sample was not told


def test_power_of_two_cards_is_not_twice_that_of_the_one_that_tells() -> None:
    assert power_w(watts(a=[300.0, 320.0], b=[None, None]), ["a", "b"]) is None
    assert power_w(watts(a=[300.0, 320.0]), ["a", "b"]) is None
    assert power_w([], ["a"]) is power_w([], []) is None
