"""When an open loop's requests are due: the rate is the one asked for, its course is followed, and seeds repeat."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.arrivals import ArrivalProcess, Arrivals, Stage

rates = st.floats(0.01, 1000)


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    ends = draw(st.tuples(st.just(0.0) | rates, rates))
    start, end = draw(st.permutations(ends))
    return Stage(draw(st.floats(0.1, 100)), start, end)


@st.composite
def arrivals(draw: st.DrawFn) -> Arrivals:
    several = draw(st.lists(stages(), max_size=3))
    last = Stage(draw(st.floats(0.1, 100)), draw(st.just(0.0) | rates), draw(rates))
    return Arrivals(draw(st.sampled_from(ArrivalProcess)), draw(rates), (*several, last), draw(st.floats(0.2, 5)))


@given(arrivals(), st.integers(1, 200), st.integers(0, 9))
def test_moments_ascend_from_the_start_and_are_the_same_again(made: Arrivals, number: int, seed: int) -> None:
    times = made.times(number, str(seed))
    assert len(times) == number
    assert times[0] >= 0
    assert all(before <= after for before, after in pairwise(times))
    assert times == made.times(number, str(seed))


@given(stages(), st.floats(0, 1))
def test_a_stages_inverse_is_that_of_its_integral(stage: Stage, share: float) -> None:
    t = stage.after(share * stage.area)
    slope = (stage.end - stage.start) / stage.seconds
    assert stage.start * t + slope * t * t / 2 == pytest.approx(share * stage.area, rel=1e-6, abs=1e-6)


def test_constant_arrivals_are_even_and_begin_at_once() -> None:
    assert Arrivals(ArrivalProcess.CONSTANT, 4, (Stage(10),)).times(5, "s") == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize(
    ("process", "burstiness", "spread"),
    [
        (ArrivalProcess.POISSON, 1.0, 1.0),
        (ArrivalProcess.GAMMA, 0.25, 2.0),
        (ArrivalProcess.GAMMA, 4.0, 0.5),
        (ArrivalProcess.CONSTANT, 1.0, 0.0),
    ],
)
def test_gaps_have_the_rate_and_the_spread_of_their_process(
    process: ArrivalProcess, burstiness: float, spread: float
) -> None:
    """A gamma gap of shape k has a deviation of 1 / sqrt(k) of its mean; 20,000 gaps know it to some percent."""
    times = Arrivals(process, 5, (Stage(1),), burstiness).times(20_000, "seed")
    gaps = [after - before for before, after in pairwise(times)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(spread, rel=0.1, abs=1e-9)


def test_a_ramp_and_steps_are_followed() -> None:
    ramp = Arrivals(ArrivalProcess.CONSTANT, 8, (Stage(10, 0, 1),))
    assert ramp.requests == 40
    assert [ramp.times(41, "")[k] for k in (0, 10, 40)] == pytest.approx([0, 5, 10])
    steps = Arrivals(ArrivalProcess.POISSON, 10, (Stage(100, 0.2, 0.2), Stage(100)))
    times = steps.times(steps.requests, "seed")
    assert sum(t < 100 for t in times) == pytest.approx(200, abs=3 * math.sqrt(200))
    assert sum(100 <= t < 150 for t in times) == pytest.approx(500, abs=3 * math.sqrt(500))


def test_beyond_its_stages_the_last_rate_goes_on() -> None:
    assert Arrivals(ArrivalProcess.CONSTANT, 2, (Stage(1, 0.5, 0.5), Stage(1))).times(7, "")[-1] == pytest.approx(3.5)


def test_it_is_told_in_words() -> None:
    assert str(Arrivals(ArrivalProcess.POISSON, 4, (Stage(30),))) == "poisson, 30 s"
    assert str(Arrivals(ArrivalProcess.GAMMA, 4, (Stage(5, 0.5, 0.5), Stage(9, 0.5, 1)), 0.5)) == (
        "gamma of burstiness 0.5, 0.5 of the rate for 5 s, 0.5 to 1 of the rate in 9 s"
    )


def test_what_sends_nothing_is_refused() -> None:
    for seconds, start, end in ((0, 1, 1), (1, 0, 0), (1, -1, 1)):
        with pytest.raises(ValueError, match="above 0"):
            Stage(seconds, start, end)
    with pytest.raises(ValueError, match="end at a rate above 0"):
        Arrivals(ArrivalProcess.POISSON, 1, (Stage(1, 1, 0),))
    for rate, burstiness in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="is 0: must be above 0"):
            Arrivals(ArrivalProcess.GAMMA, rate, (Stage(1),), burstiness)
    with pytest.raises(ValueError, match="needs a stage"):
        Arrivals(ArrivalProcess.GAMMA, 1, ())
