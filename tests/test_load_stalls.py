"""Which gaps and first chunks the client's own stalls made late, however long the answers were."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.rows import RequestRow
from workers.load.stalls import TICK_S, Stall, made_later_s, stood_s
from workers.load.summary import percentile


def stamped(due_s: float, blocked: list[tuple[float, float]]) -> float:
    """A chunk that comes while the loop is blocked is stamped when that is over."""
    at = bisect_right(blocked, (due_s, 0.0)) - 1
    return max(due_s, blocked[at][1]) if at >= 0 else due_s


def seen(blocked: list[tuple[float, float]], window_s: float) -> list[Stall]:
    """What timers 10 ms apart tell of it."""
    stalls, at_s = [], 0.0
    while at_s < window_s:
        woken_s = stamped(at_s + TICK_S, blocked)
        if woken_s - at_s - TICK_S > TICK_S / 2:
            stalls.append(Stall(woken_s, woken_s - at_s - TICK_S))
        at_s = woken_s
    return stalls


def answers(streams: int, tokens: int, gap_s: float, blocked: list[tuple[float, float]]) -> list[RequestRow]:
    """One answer a stream, its tokens `gap_s` apart on the server; streams begin a little after each other."""
    made = []
    for stream in range(streams):
        sent_s = stream * gap_s / streams
        stamps = [stamped(sent_s + gap_s * (n + 1), blocked) for n in range(tokens)]
        gaps = [round((b - a) * 1e6) for a, b in pairwise(stamps)]
        made.append(RequestRow(stream, sent_s, True, ttft_s=stamps[0] - sent_s, gaps_us=gaps, chunks=tokens))
    return made


def figures(rows: list[RequestRow]) -> tuple[float, float]:
    gaps = percentile([gap / 1e6 for row in rows for gap in row.gaps_us], 99)
    return gaps or 0.0, percentile([row.ttft_s or 0.0 for row in rows], 95) or 0.0


@pytest.mark.parametrize("tokens", [40, 400, 1000])
def test_a_stalled_loop_is_told_whatever_the_length_of_the_answers(tokens: int) -> None:
    """Answers of 10 s do not excuse 80 ms in which 10 ms between tokens are measured."""
    blocked = [(n * 0.4 + 0.1, n * 0.4 + 0.18) for n in range(int(tokens * 0.01 / 0.4) + 1)]
    seen_p99, _ = figures(answers(16, tokens, 0.01, blocked))
    assert seen_p99 > 0.05
    raised_s, _ = made_later_s(answers(16, tokens, 0.01, blocked), seen(blocked, tokens * 0.01))
    assert raised_s == pytest.approx(seen_p99 - 0.01, abs=TICK_S)


STALLS = st.lists(st.tuples(st.floats(0.05, 0.6), st.floats(0.001, 0.3)), max_size=12)
"""(between two, how long)."""


@given(STALLS, st.sampled_from([0.005, 0.02, 0.08]), st.integers(1, 8))
def test_what_stalls_did_is_known_to_a_timers_period(
    stalls: list[tuple[float, float]], gap_s: float, streams: int
) -> None:
    blocked, at_s = [], 0.0
    for calm_s, long_s in stalls:
        blocked.append((at_s + calm_s, at_s + calm_s + long_s))
        at_s += calm_s + long_s
    tokens = int(4 / gap_s)
    rows, true = answers(streams, tokens, gap_s, blocked), answers(streams, tokens, gap_s, [])
    found = made_later_s(rows, seen(blocked, 12.0))
    for told, measured, truth in zip(found, figures(rows), figures(true), strict=True):
        assert told >= 0
        assert measured - told - truth <= TICK_S + 1e-5  # no more is left than a stall that no timer saw
    if not blocked:
        assert found == (0.0, 0.0)


def test_a_first_chunk_that_lay_there_while_the_loop_stood_is_late() -> None:
    rows = [RequestRow(n, float(n), True, ttft_s=0.02 if n % 5 else 0.07) for n in range(20)]
    stalls = [Stall(n + 0.07, 0.045) for n in range(0, 20, 5)]
    assert made_later_s(rows, stalls) == (0.0, pytest.approx(0.05))
    assert made_later_s(rows, []) == (0.0, 0.0)  # the server itself was slow


def test_a_gap_of_the_servers_own_is_not_the_clients() -> None:
    gaps = [10_000] * 20 + [200_000] + [10_000] * 20
    rows = [RequestRow(0, 0.0, True, ttft_s=0.01, gaps_us=gaps)]
    assert made_later_s(rows, [Stall(0.1, 0.006), Stall(0.55, 0.006)])[0] == pytest.approx(0, abs=1e-4)
    assert made_later_s(rows, [Stall(0.412, 0.006)])[0] <= 0.011  # a short stall does not make a long gap its own
    assert made_later_s(rows, [Stall(0.412, 0.19)])[0] > 0.1


@pytest.mark.parametrize(
    ("from_s", "to_s", "stood"),
    [(0.0, 0.1, 0.0), (0.1, 0.45, 0.05), (0.42, 0.48, 0.06), (0.45, 0.7, 0.05), (0.5, 0.9, 0.0), (0.0, 2.0, 0.12)],
)
def test_how_long_the_loop_stood_in_a_time_is_what_its_stalls_share_with_it(
    from_s: float, to_s: float, stood: float
) -> None:
    stalls = [Stall(0.5, 0.1 - TICK_S / 2), Stall(1.0, 0.02 - TICK_S / 2)]  # from 0.4 to 0.5, and 0.98 to 1.0
    assert stood_s(from_s, to_s, stalls) == pytest.approx(stood)


@given(STALLS, st.floats(0, 3), st.floats(0, 3))
def test_it_never_stood_longer_than_the_time_was(
    blocked: list[tuple[float, float]], from_s: float, length_s: float
) -> None:
    at_s, spans = 0.0, []
    for rest_s, stalled_s in blocked:
        spans.append((at_s + rest_s, at_s + rest_s + stalled_s))
        at_s = spans[-1][1]
    stood = stood_s(from_s, from_s + length_s, seen(spans, 6.0))
    assert -1e-9 <= stood <= length_s + 1e-9
