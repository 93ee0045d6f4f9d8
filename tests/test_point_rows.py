"""What a level's row says of its load."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.arrivals import ArrivalProcess, Arrivals, Stage
from workers.point_rows import offered_qps


@given(st.floats(0.5, 100), st.floats(5, 60))
def test_constant_arrivals_offer_just_their_rate(rate: float, seconds: float) -> None:
    """Ten requests at 0, 1, ... 9 s are one a second, not 1.11."""
    arrivals = Arrivals(ArrivalProcess.CONSTANT, rate, (Stage(seconds),))
    assert offered_qps(arrivals, arrivals.times(arrivals.requests, "")) == pytest.approx(rate)


def test_drawn_arrivals_begin_with_a_gap() -> None:
    assert offered_qps(Arrivals(ArrivalProcess.POISSON, 1.0, (Stage(4),)), [0.5, 1.0, 3.0, 4.0]) == 1.0


def test_one_request_at_once_has_no_rate() -> None:
    assert offered_qps(Arrivals(ArrivalProcess.CONSTANT, 1.0, (Stage(1),)), [0.0]) is None
