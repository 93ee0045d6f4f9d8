"""Does a server keep up? Held against ideal servers, whose capacity is known: no arrivals make a verdict false."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import keeping_up_truth
from contract.arrivals import ArrivalProcess, Arrivals, Stage
from contract.rows import KEEPS_UP, RequestRow
from workers.load.keeping_up import keeping_up, waits_s

ARRIVALS = st.builds(
    Arrivals,
    st.sampled_from(ArrivalProcess),
    st.sampled_from([1.0, 2.0, 10.0]),
    st.sampled_from([(Stage(30),), (Stage(60, 0, 1),), (Stage(20), Stage(20, 1, 0.3)), (Stage(10, 0.2), Stage(30))]),
    st.sampled_from([0.2, 1.0, 4.0]),
)
SEEDS = st.integers(0, 10**6).map(str)


def due(arrivals: Arrivals, seed: str) -> list[float]:
    return arrivals.times(arrivals.requests, seed)


def queue(sends: list[float], capacity: float, least_s: float = 0.0) -> list[RequestRow]:
    """First come, first served, `capacity` a second; each answer takes `least_s` more."""
    waits = waits_s(sends, capacity)
    return [
        RequestRow(n, sent_s, True, e2e_s=wait_s + 1 / capacity + least_s)
        for n, (sent_s, wait_s) in enumerate(zip(sends, waits, strict=True))
    ]


def offered(sends: list[float]) -> float:
    return (len(sends) - 1) / (sends[-1] - sends[0])


@given(ARRIVALS, SEEDS, st.floats(0.01, 20))
def test_a_server_without_a_limit_never_falls_behind(arrivals: Arrivals, seed: str, e2e_s: float) -> None:
    found = keeping_up([RequestRow(n, at_s, True, e2e_s=e2e_s) for n, at_s in enumerate(due(arrivals, seed))])
    assert found is not None
    assert found.keeps_up is not False
    assert found.ended_qps == pytest.approx(found.sent_qps)


@given(ARRIVALS, SEEDS, st.floats(1.0, 8.0), st.floats(0, 6))
def test_a_server_that_can_do_what_is_sent_never_falls_behind(
    arrivals: Arrivals, seed: str, share: float, least_s: float
) -> None:
    sends = due(arrivals, seed)
    found = keeping_up(queue(sends, share * offered(sends), least_s))
    assert found is not None
    assert found.keeps_up is not False


@given(ARRIVALS, SEEDS, st.floats(0.002, 0.85), st.floats(0, 6))
def test_a_server_that_can_do_clearly_less_never_keeps_up(
    arrivals: Arrivals, seed: str, share: float, least_s: float
) -> None:
    sends = due(arrivals, seed)
    found = keeping_up(queue(sends, share * offered(sends), least_s))
    assert found is not None
    assert found.keeps_up is not True


@pytest.mark.parametrize("name", keeping_up_truth.SERVERS)
def test_no_verdict_is_false_on_levels_drawn_at_random(name: str) -> None:
    """docs/definitions.md gives what comes of 18,000."""
    server, keeps_up = keeping_up_truth.SERVERS[name]
    found = keeping_up_truth.verdicts(server, 300)
    assert found[not keeps_up] == 0
    assert found[keeps_up] >= 180


@pytest.mark.parametrize("seconds", [30, 300, 3000])
@pytest.mark.parametrize("capacity", [0.5, 2.0, 5.0])
def test_however_far_overloaded_the_verdict_is_known(seconds: float, capacity: float) -> None:
    sends = due(Arrivals(ArrivalProcess.POISSON, 10.0, (Stage(seconds),)), "s")
    found = keeping_up(queue(sends, capacity))
    assert found is not None
    assert found.keeps_up is False
    assert found.ended_qps == pytest.approx(capacity, rel=0.01)


def test_at_usual_rates_a_verdict_is_nearly_always_given() -> None:
    verdicts: Counter[bool | None] = Counter()
    for seed in range(100):
        sends = due(Arrivals(ArrivalProcess.POISSON, 4.0, (Stage(30),)), str(seed))
        for share in (0.5, 2.0):
            found = keeping_up(queue(sends, share * offered(sends), 3.0))
            verdicts[found and found.keeps_up] += 1
    assert verdicts[None] <= 4


def test_ramps_and_few_requests_of_long_answers_keep_up() -> None:
    """Counted between two moments, these ended up to a quarter less than was sent."""
    for stages in ((Stage(30),), (Stage(60, 0, 1),)):
        for seed in range(100):
            sends = due(Arrivals(ArrivalProcess.POISSON, 1.0, stages), str(seed))
            found = keeping_up([RequestRow(n, at_s, True, e2e_s=6.0) for n, at_s in enumerate(sends)])
            assert found is not None
            assert found.keeps_up is not False


def test_too_few_requests_or_answers_of_very_different_lengths_leave_it_open() -> None:
    assert keeping_up(queue([float(n) for n in range(19)], 0.1)) is None
    assert keeping_up([RequestRow(n, float(n), False, e2e_s=1.0) for n in range(50)]) is None
    uneven = [RequestRow(n, float(n), True, e2e_s=20.0 if n % 2 else 1.0) for n in range(24)]
    found = keeping_up(uneven)
    assert found is not None
    assert found.keeps_up is None


def test_the_border_is_where_nine_in_ten_end() -> None:
    sends = [n / 10 for n in range(1000)]
    shares = (KEEPS_UP - 0.02, KEEPS_UP + 0.02)
    assert [found.keeps_up for share in shares if (found := keeping_up(queue(sends, share * 10)))] == [False, True]
