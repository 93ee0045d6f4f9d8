"""Which gaps and first chunks the client's own stalls made late, however long the answers were."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.rows import RequestRow
from workers.load.stalls import TICK_S, Stall, late_stamps


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


@pytest.mark.parametrize("tokens", [40, 400, 1000])
def test_a_stalled_loop_is_told_whatever_the_length_of_the_answers(tokens: int) -> None:
    """Answers of 10 s do not excuse 80 ms in which 10 ms between tokens are measured."""
    window_s = tokens * 0.01
    blocked = [(n * 0.4 + 0.1, n * 0.4 + 0.18) for n in range(int(window_s / 0.4) + 1)]
    gaps, _ = late_stamps(answers(16, tokens, 0.01, blocked), seen(blocked, window_s))
    assert gaps == 16 * sum(start_s < window_s - 0.08 for start_s, _ in blocked)
    assert gaps > 0.01 * 16 * (tokens - 1)


def test_a_first_chunk_that_lay_there_while_the_loop_stood_is_late() -> None:
    rows = [RequestRow(n, float(n), True, ttft_s=0.02 if n % 5 else 0.07) for n in range(20)]
    stalls = [Stall(n + 0.07, 0.045) for n in range(0, 20, 5)]
    assert late_stamps(rows, stalls) == (0, 4)
    assert late_stamps(rows, []) == (0, 0)  # the server itself was slow


def test_a_gap_of_the_servers_own_is_not_the_clients() -> None:
    rows = [RequestRow(0, 0.0, True, ttft_s=0.01, gaps_us=[10_000] * 50 + [200_000] + [10_000] * 50)]
    assert late_stamps(rows, [Stall(0.3, 0.08), Stall(0.9, 0.08)]) == (0, 0)
    assert late_stamps(rows, [Stall(0.712, 0.19)]) == (1, 0)


@given(st.lists(st.floats(0, 5), max_size=30), st.floats(0, 0.0045))
def test_stalls_too_short_to_matter_make_nothing_late(starts: list[float], lag_s: float) -> None:
    rows = answers(4, 100, 0.02, [])
    assert late_stamps(rows, [Stall(start_s, lag_s) for start_s in sorted(starts)]) == (0, 0)
