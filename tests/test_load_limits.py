"""Whether the client was the limit of a level, from what it says of itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.rows import ClientRow, RequestRow
from workers.load.limits import achieved_share, client_limits


def closed_loop(streams: int, requests: int, e2e_s: float, slip_s: float) -> list[RequestRow]:
    """Every stream sends its next request `slip_s` after its last answer."""
    each = requests // streams
    return [
        RequestRow(stream * each + n, sent_s=n * (e2e_s + slip_s), ok=True, e2e_s=e2e_s)
        for stream in range(streams)
        for n in range(each)
    ]


CALM = ClientRow(8, cpu_share=0.1, wait_share=0.01, lag_p99_s=0.002)
ON_TIME = closed_loop(8, 80, 0.3, 0.0001)


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (CALM, None),
        (ClientRow(8, cpu_share=0.95, lag_p99_s=0.002), "busy or waiting for a core for 95%"),
        (ClientRow(8, cpu_share=0.4, wait_share=0.55, lag_p99_s=0.002), "busy or waiting for a core for 95%"),
        (ClientRow(8, cpu_share=0.1, lag_p99_s=0.05), "woke up 50 ms late"),
        (ClientRow(8, cpu_share=0.1, lag_p99_s=0.05, late_share=0.2), "woke up 50 ms late"),
        (ClientRow(8, cpu_share=0.1, lag_p99_s=0.05, late_share=0.02), None),  # one hiccup
        (ClientRow(8, cpu_share=0.1, lag_p99_s=0.014), None),  # 5 % of 0.3 s is 15 ms
        (ClientRow(8, cpu_share=0.1, lag_p99_s=None), None),
    ],
)
def test_a_busy_or_late_client_is_the_limit(client: ClientRow, words: str | None) -> None:
    limits = client_limits([CALM, client], ON_TIME, 8)
    assert (limits == []) == (words is None)
    assert words is None or words in limits[0]


def test_a_load_that_was_not_offered_is_the_clients_doing() -> None:
    assert client_limits([CALM], closed_loop(8, 80, 0.3, 0.003), 8) == []
    (words,) = client_limits([CALM], closed_loop(8, 80, 0.3, 0.03), 8)
    assert "of the asked concurrency was in flight" in words


@given(st.integers(1, 8), st.integers(2, 9), st.floats(0.01, 2), st.floats(0, 1))
def test_the_achieved_share_is_that_of_the_time_in_flight(streams: int, each: int, e2e_s: float, slip_s: float) -> None:
    share = achieved_share(closed_loop(streams, streams * each, e2e_s, slip_s), streams)
    assert share == pytest.approx(e2e_s / (e2e_s + slip_s))


def test_one_round_of_requests_says_nothing_of_it() -> None:
    assert achieved_share(closed_loop(4, 4, 0.3, 0.0), 4) is None


def test_a_window_too_short_to_tell_is_not_judged() -> None:
    busy = ClientRow(8, cpu_share=0.99, lag_p99_s=0.5)
    assert client_limits([busy], closed_loop(8, 80, 0.03, 0.01), 8) == []
    assert client_limits([busy], closed_loop(8, 80, 0.06, 0.01), 8) != []


def test_a_stream_is_taken_until_its_last_byte() -> None:
    rows = closed_loop(8, 80, 0.30, 0.02)
    for row in rows:
        row.last_byte_s = 0.3199  # usage, [DONE] and the end of the body came late
    assert client_limits([CALM], rows, 8) == []


@pytest.mark.parametrize(("delay_s", "limited"), [(0.001, False), (0.012, False), (0.03, True)])
def test_an_open_loop_has_to_send_when_requests_are_due(delay_s: float, limited: bool) -> None:
    """Late is what is above 10 ms and above 5 % of the median latency, here 15 ms."""
    rows = [RequestRow(n, sent_s=n * 0.1 + delay_s, ok=True, due_s=n * 0.1, e2e_s=0.3) for n in range(50)]
    limits = client_limits([CALM], rows, None)
    assert bool(limits) == limited
    assert not limited or limits == ["requests were sent 30 ms after they were due (p99)"]
