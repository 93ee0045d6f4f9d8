"""The steady window of a level: what is in it, what is left out, and that nothing is made up where there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.rows import RequestRow
from workers.load.steady import stable, steady
from workers.load.summary import mean_in_flight


def row(ordinal: int, sent_s: float, e2e_s: float, tokens: int = 11, ok: bool = True) -> RequestRow:
    """Tokens come evenly, the first after a `tokens`-th of the time."""
    each = e2e_s / tokens
    gaps = [round(each * 1e6)] * (tokens - 1)
    return RequestRow(
        ordinal,
        sent_s,
        ok,
        ttft_s=each,
        e2e_s=e2e_s,
        tpot_s=each,
        gaps_us=gaps,
        completion_tokens=tokens,
        chunks=tokens,
    )


def closed_loop(
    streams: int, rounds: int, e2e_s: float, ramp_s: float, first_s: float | None = None
) -> list[RequestRow]:
    """Streams that begin one after the other, `ramp_s` apart, and each send `rounds` requests; each one's first may
    take another time."""
    first_s = first_s or e2e_s
    return [
        row(stream * rounds + n, stream * ramp_s + (n and first_s + (n - 1) * e2e_s), e2e_s if n else first_s)
        for stream in range(streams)
        for n in range(rounds)
    ]


def test_ramp_and_drain_are_left_out() -> None:
    found = steady(closed_loop(4, 5, 1.0, 0.1), 4)
    assert found is not None
    assert (found.steady_from_s, found.steady_settled_s, found.steady_to_s) == pytest.approx((0.3, 1.3, 5.0))
    assert found.steady_completed == 13  # of 20: the last of three streams end later, and the first of each is the ramp
    assert found.steady_tok_s == pytest.approx(4 * 11 / 1.0, rel=0.02)
    assert found.steady_p95_e2e_s == pytest.approx(1.0)


@given(st.integers(1, 40), st.floats(0.2, 0.9) | st.floats(1.1, 3.0), st.floats(0, 0.004))
def test_the_opening_bursts_latencies_are_left_out(streams: int, first_s: float, ramp_s: float) -> None:
    """Prompts that are sent all at once wait for each other: of all streams, also those that begin when 95 % have."""
    found = steady(closed_loop(streams, 9, 1.0, ramp_s, first_s), streams)
    assert found is not None
    assert found.steady_completed is not None
    assert 7 * streams - streams < found.steady_completed <= 8 * streams
    figures = (found.steady_mean_e2e_s, found.steady_p50_e2e_s, found.steady_p95_e2e_s)
    assert figures == pytest.approx((1.0, 1.0, 1.0))
    assert (found.steady_p95_ttft_s, found.steady_p95_tpot_s) == pytest.approx((1 / 11, 1 / 11))


def test_where_little_is_left_after_the_opening_burst_there_are_tokens_but_no_latencies() -> None:
    found = steady(closed_loop(4, 2, 1.0, 0.1), 4)
    assert found is not None
    assert (found.steady_settled_s, found.steady_to_s) == pytest.approx((1.3, 2.0))
    assert found.steady_tok_s == pytest.approx(44, rel=0.05)
    assert (found.steady_completed, found.steady_mean_e2e_s, found.steady_p95_ttft_s) == (None, None, None)


@given(st.integers(1, 8), st.integers(3, 8), st.floats(0.05, 3), st.floats(0, 0.01))
def test_in_a_steady_window_littles_law_holds(streams: int, rounds: int, e2e_s: float, ramp: float) -> None:
    """L = lambda * W: tokens a second over tokens a request is the rate of requests."""
    rows = closed_loop(streams, rounds, e2e_s, ramp * e2e_s)
    found = steady(rows, streams)
    assert found is not None
    in_flight = mean_in_flight([_cut(r, found.steady_from_s) for r in rows], found.steady_to_s - found.steady_from_s)
    assert in_flight == pytest.approx(streams, rel=1e-6)
    assert found.steady_tok_s / 11 * e2e_s == pytest.approx(streams, rel=0.15 if rounds < 5 else 0.08)


def _cut(each: RequestRow, from_s: float) -> RequestRow:
    return RequestRow(each.ordinal, each.sent_s - from_s, True, e2e_s=each.e2e_s)


def test_a_level_that_was_never_full_has_no_steady_window() -> None:
    assert steady([row(0, 0.0, 1.0), row(1, 1.0, 1.0)], 4) is None
    assert steady([], 1) is None
    assert steady([row(0, 0.0, 1.0, ok=False), row(1, 0.0, 1.0, ok=False)], 2) is None


def test_a_failed_request_was_in_flight_but_gives_no_latency_and_no_tokens() -> None:
    rows = [*closed_loop(1, 6, 1.0, 0.0), *(row(10 + n, float(n), 1.0, ok=False) for n in range(6))]
    found = steady(rows, 2)
    assert found is not None
    assert (found.steady_completed, found.steady_tok_s) == (5, pytest.approx(11))


def test_an_open_loop_is_steady_from_its_first_answer_to_its_last_send() -> None:
    rows = [row(n, n * 0.5, 1.0) for n in range(10)]
    found = steady(rows, None)
    assert found is not None
    assert (found.steady_from_s, found.steady_settled_s, found.steady_to_s) == (1.0, 1.5, 4.5)
    assert found.steady_completed == 6
    assert found.steady_tok_s == pytest.approx(22, rel=0.05)


def test_a_warm_up_is_over_when_two_rounds_agree() -> None:
    assert [stable(rates) for rates in ([], [5.0], [5.0, 9.0], [5.0, 9.0, 8.5])] == [False, False, False, True]
