"""Whether the client was the limit of a level, from what it says of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.failures import FailureClass
from contract.rows import ClientRow, RequestRow
from workers.load.limits import achieved_share, client_limits, send_delay_s
from workers.load.plan import LoadResult
from workers.load.stalls import HeldBack


def closed_loop(streams: int, requests: int, e2e_s: float, slip_s: float) -> list[RequestRow]:
    """Every stream sends its next request `slip_s` after its last answer."""
    each = requests // streams
    return [
        RequestRow(
            stream * each + n,
            n * (e2e_s + slip_s),
            ok=True,
            ttft_s=0.02,
            e2e_s=e2e_s,
            tpot_s=0.028,
            completion_tokens=11,
            gaps_us=[28_000] * 10,
        )
        for stream in range(streams)
        for n in range(each)
    ]


CALM = ClientRow(8, cpu_share=0.1, wait_share=0.01, lag_p99_s=0.002)
ON_TIME = closed_loop(8, 80, 0.3, 0.0001)
"""80 requests, 800 gaps."""


def level(
    clients: list[ClientRow], rows: list[RequestRow], share: float | None, held_back: HeldBack | None = None
) -> LoadResult:
    return LoadResult(rows, 0.0, 0.0, 0.0, clients, achieved_share=share, held_back=held_back or HeldBack())


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (CALM, None),
        (ClientRow(8, cpu_share=0.95), "busy or waiting for a core for 95%"),
        (ClientRow(8, cpu_share=0.4, wait_share=0.55), "busy or waiting for a core for 95%"),
        (ClientRow(8, cpu_share=0.1, held_s=12.0), None),
        (ClientRow(8, cpu_share=0.1, held_s=9.0), None),  # the other process says nothing: nothing to compare
        (ClientRow(8, cpu_share=0.1, gap_p99_raised_s=0.5, e2e_p95_raised_s=0.5), None),  # noted, not judged
    ],
)
def test_a_busy_client_is_the_limit(client: ClientRow, words: str | None) -> None:
    limits = client_limits(level([CALM, client], ON_TIME, 1.0))
    assert (limits == []) == (words is None)
    assert words is None or words in limits[0]


def all_by(value_s: float, late_s: float, number: int = 1) -> tuple[tuple[float, float], ...]:
    return ((value_s, value_s - late_s),) * number


@pytest.mark.parametrize(
    ("held_back", "words"),
    [
        (HeldBack(), None),
        (HeldBack(gaps=all_by(0.028, 0.012, 800)), "raised the level's p99 gap between chunks by 12 ms"),
        (HeldBack(gaps=all_by(0.028, 0.009, 800)), None),
        (HeldBack(ttft=all_by(0.02, 0.012, 80)), "raised the level's p95 of TTFT by 12 ms"),
        (HeldBack(ttft=all_by(0.02, 0.009, 80)), None),
        (HeldBack(e2e=all_by(0.3, 0.031, 80)), "raised the level's p95 of E2EL by 31 ms"),  # a tenth of 300
        (HeldBack(e2e=all_by(0.3, 0.029, 80)), None),
        (HeldBack(tpot=all_by(0.028, 0.0029, 80)), "raised the level's p95 of TPOT by 2.9 ms"),  # a tenth of 28
        (HeldBack(tpot=all_by(0.028, 0.0027, 80)), None),
    ],
)
def test_a_client_whose_stalls_raised_the_levels_figures_is_the_limit(held_back: HeldBack, words: str | None) -> None:
    limits = client_limits(level([CALM, CALM], ON_TIME, 1.0, held_back))
    assert (limits == []) == (words is None)
    assert words is None or words in limits[0]


def test_a_late_p99_of_ttft_and_e2el_is_said_and_judges_nothing() -> None:
    """Three of 120 requests were late: the level's p95s are the server's, its p99s are not."""
    rows = closed_loop(8, 120, 0.3, 0.0001)
    for row in rows[:3]:
        row.ttft_s, row.e2e_s = 0.21, 0.49
    late = level([CALM], rows, 1.0, HeldBack(ttft=all_by(0.21, 0.19, 3), e2e=all_by(0.49, 0.19, 3)))
    assert client_limits(late) == []
    assert (late.raised.ttft_p95_raised_s, late.raised.e2e_p95_raised_s) == (0.0, 0.0)
    assert (late.raised.ttft_p99_raised_s, late.raised.e2e_p99_raised_s) == (pytest.approx(0.19), pytest.approx(0.19))


def test_what_one_of_two_processes_held_back_counts_among_all_their_requests() -> None:
    """Its own p99 gap may be off by much where that of all streams, which is what the level says, is not."""
    late = [replace(row, gaps_us=[*row.gaps_us[1:], 178_000]) for row in ON_TIME[:1]]
    held_back = HeldBack(gaps=all_by(0.178, 0.15))
    alone, all_streams = [*late, *ON_TIME[1:4]], [*late, *ON_TIME[1:]]
    assert "raised the level's p99 gap" in client_limits(level([CALM], alone, 1.0, held_back))[0]  # 1 of 40 gaps
    assert client_limits(level([CALM, CALM], all_streams, 1.0, held_back)) == []  # 1 of 800


@pytest.mark.parametrize(("tokens", "limited"), [(None, False), (3, False), (4, True)])
def test_a_tpot_of_a_few_tokens_has_to_be_10_ms_late_in_all(tokens: int | None, limited: bool) -> None:
    """4 ms of 28 are more than a tenth, but two of them less than what timers can tell."""
    rows = closed_loop(8, 80, 0.3, 0.0001)
    for row in rows:
        row.completion_tokens = tokens
    assert bool(client_limits(level([CALM], rows, 1.0, HeldBack(tpot=all_by(0.028, 0.004, 80))))) == limited


@pytest.mark.parametrize(("held_s", "broken"), [(24.0, False), (22.1, False), (21.9, True), (26.2, True)])
def test_littles_law_is_broken_where_the_two_counts_of_time_in_flight_differ(held_s: float, broken: bool) -> None:
    """80 requests of 0.3 s are 24 s; 5 % and 10 ms a request may be lost between timers."""
    limits = client_limits(level([ClientRow(8, cpu_share=0.1, held_s=held_s)], ON_TIME, 1.0))
    assert bool(limits) == broken
    assert not broken or "s by counting and for 24 s by their stamps" in limits[0]


def not_offered(rows: list[RequestRow]) -> list[str]:
    return client_limits(level([CALM], rows, achieved_share(rows, 8)))


def test_a_load_that_was_not_offered_is_the_clients_doing() -> None:
    assert not_offered(closed_loop(8, 80, 0.3, 0.003)) == []
    (words,) = not_offered(closed_loop(8, 80, 0.3, 0.03))
    assert "90.9% of the streams were in flight" in words


@given(st.integers(1, 8), st.integers(2, 9), st.floats(0.01, 2), st.floats(0, 1))
def test_the_achieved_share_is_that_of_the_time_in_flight(streams: int, each: int, e2e_s: float, slip_s: float) -> None:
    share = achieved_share(closed_loop(streams, streams * each, e2e_s, slip_s), streams)
    assert share == pytest.approx(e2e_s / (e2e_s + slip_s))


def test_one_round_of_requests_says_nothing_of_it() -> None:
    assert achieved_share(closed_loop(4, 4, 0.3, 0.0), 4) is None


def test_a_window_too_short_to_tell_is_not_judged() -> None:
    busy = ClientRow(8, cpu_share=0.99, gap_p99_raised_s=0.5)
    assert client_limits(level([busy], closed_loop(8, 80, 0.03, 0.01), 1.0)) == []
    assert client_limits(level([busy], closed_loop(8, 80, 0.06, 0.01), 1.0)) != []


def test_a_stream_is_taken_until_its_last_byte() -> None:
    rows = closed_loop(8, 80, 0.30, 0.02)
    for row in rows:
        row.last_byte_s = 0.3199  # usage, [DONE] and the end of the body came late
    assert not_offered(rows) == []


@pytest.mark.parametrize(("delay_s", "limited"), [(0.001, False), (0.012, False), (0.03, True)])
def test_an_open_loop_has_to_send_when_requests_are_due(delay_s: float, limited: bool) -> None:
    """Late is what is above 10 ms and above a tenth of the median TTFT, here 15 ms, however long the answers are."""
    rows = [RequestRow(n, sent_s=n * 0.1 + delay_s, ok=True, due_s=n * 0.1, ttft_s=0.15, e2e_s=9.0) for n in range(50)]
    limits = client_limits(level([CALM], rows, None))
    assert bool(limits) == limited
    assert not limited or limits == ["requests were sent 30 ms after they were due (p99)"]


@pytest.mark.parametrize(("late_s", "limited"), [(0.001, False), (0.03, True)])
def test_what_connecting_takes_is_not_how_late_a_request_was_sent(late_s: float, limited: bool) -> None:
    """A server 50 ms away behind TLS takes three round trips to connect to, whatever its client does."""
    rows = [
        RequestRow(n, n + late_s + 0.15, ok=True, due_s=float(n), connect_s=0.15, ttft_s=0.2, e2e_s=0.9)
        for n in range(50)
    ]
    assert send_delay_s(rows) == pytest.approx(late_s)
    words = ["requests were sent 30 ms after they were due (p99)"]
    assert client_limits(level([CALM], rows, None)) == words * limited


def test_a_closed_loop_that_came_late_to_its_window_did_not_offer_its_part() -> None:
    rows = closed_loop(8, 80, 0.3, 0.0)
    for row in rows:
        row.sent_s += 0.3
    (words,) = not_offered(rows)
    assert "90.0% of the streams were in flight" in words


def test_requests_that_the_clients_host_had_no_socket_for_are_its_limit_in_the_shortest_window() -> None:
    rows = closed_loop(8, 80, 0.3, 0.0001)
    rows[7].ok, rows[7].failure_class, rows[7].failure_message = False, FailureClass.CLIENT_SOCKETS, "no port left"
    for judged in (rows, rows[:8]):
        assert client_limits(level([CALM], judged, 1.0)) == ["1 requests got no connection: no port left"]
