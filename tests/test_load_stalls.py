"""Which gaps and first chunks the client's own stalls made late, however long the answers were."""

from __future__ import annotations

import random
from bisect import bisect_right
from dataclasses import astuple, replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.rows import RequestRow
from workers.load.stalls import SHORTEST_S, TICK_S, HeldBack, Raised, Stall, held_back, raised_by, stood_s
from workers.load.summary import percentile

Rows = list[RequestRow]


def made_later_s(rows: Rows, stalls: list[Stall]) -> Raised:
    """What one process's stalls did to its own figures."""
    return raised_by(rows, held_back(rows, stalls))


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


def answer(ordinal: int, sent_s: float, tokens: int, gap_s: float, blocked: list[tuple[float, float]]) -> RequestRow:
    """An answer whose tokens are `gap_s` apart on the server."""
    stamps = [stamped(sent_s + gap_s * (n + 1), blocked) for n in range(tokens)]
    return RequestRow(
        ordinal,
        sent_s,
        True,
        ttft_s=stamps[0] - sent_s,
        e2e_s=stamps[-1] - sent_s,
        tpot_s=(stamps[-1] - stamps[0]) / (tokens - 1),
        gaps_us=[round((b - a) * 1e6) for a, b in pairwise(stamps)],
        completion_tokens=tokens,
        chunks=tokens,
    )


def answers(streams: int, tokens: int, gap_s: float, blocked: list[tuple[float, float]]) -> list[RequestRow]:
    """One answer a stream; streams begin a little after each other."""
    return [answer(stream, stream * gap_s / streams, tokens, gap_s, blocked) for stream in range(streams)]


def closed_loop(streams: int, window_s: float, tokens: int, gap_s: float, blocked: list[tuple[float, float]]) -> Rows:
    """Every stream sends its next as soon as its process has stamped the last token before."""
    made: Rows = []
    for stream in range(streams):
        free_s = stream * gap_s / streams
        while free_s < window_s:
            made.append(answer(len(made), free_s, tokens, gap_s, blocked))
            free_s += made[-1].e2e_s or 0.0
    return made


def figures(rows: list[RequestRow]) -> tuple[float, ...]:
    """p99 gap, then p95 and p99 of TTFT and of E2EL."""
    gaps = [gap / 1e6 for row in rows for gap in row.gaps_us]
    ttft, e2e = [row.ttft_s or 0.0 for row in rows], [row.e2e_s or 0.0 for row in rows]
    of = ((gaps, 99), (ttft, 95), (ttft, 99), (e2e, 95), (e2e, 99))
    return tuple(percentile(values, q) or 0.0 for values, q in of)


def told_s(raised: Raised) -> tuple[float, ...]:
    """By how much these five are said to be raised."""
    return astuple(raised)[:5]


@pytest.mark.parametrize("tokens", [40, 400, 1000])
def test_a_stalled_loop_is_told_whatever_the_length_of_the_answers(tokens: int) -> None:
    """Answers of 10 s do not excuse 80 ms in which 10 ms between tokens are measured."""
    blocked = [(n * 0.4 + 0.1, n * 0.4 + 0.18) for n in range(int(tokens * 0.01 / 0.4) + 1)]
    seen_p99, *_ = figures(answers(16, tokens, 0.01, blocked))
    assert seen_p99 > 0.05
    raised = made_later_s(answers(16, tokens, 0.01, blocked), seen(blocked, tokens * 0.01))
    assert raised.gap_p99_raised_s == pytest.approx(seen_p99 - 0.01, abs=TICK_S)


NOTHING = Raised(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_stalls_that_gaps_and_first_chunks_escape_are_told_by_the_last_ones() -> None:
    """A closed loop sends just after its process has woken up: 100 ms in about 1.3 s, and 32 tokens 10 ms apart, are in
    less than 1 % of the gaps and 5 % of the TTFTs, but in 8 % of the last chunks."""
    dice, blocked = random.Random(1), [(0.4, 0.5)]
    while blocked[-1][1] < 65:
        at_s = blocked[-1][1] + dice.uniform(0.6, 1.8)
        blocked.append((at_s, at_s + 0.1))
    rows = closed_loop(16, 65.0, 32, 0.01, blocked)
    raised = made_later_s(rows, seen(blocked, 70.0))
    p95 = figures(rows)[3]
    assert (raised.gap_p99_raised_s, raised.ttft_p95_raised_s) == (
        pytest.approx(0, abs=1e-3),
        pytest.approx(0, abs=1e-3),
    )
    assert p95 > 0.35
    assert raised.e2e_p95_raised_s == pytest.approx(p95 - 0.32, abs=TICK_S)
    assert raised.tpot_p95_raised_s == pytest.approx(raised.e2e_p95_raised_s / 31, abs=TICK_S / 31)
    assert made_later_s(closed_loop(16, 65.0, 32, 0.01, []), []) == NOTHING


def test_a_late_first_chunk_hides_no_late_last_one() -> None:
    """It makes its own TPOT look shorter; what stalls did to others' is still there."""
    blocked = [(n * 1.0 + 0.4, n * 1.0 + 0.5) for n in range(60)]
    rows = [answer(n, n * 0.0137, 32, 0.01, blocked) for n in range(4000)]  # open loop: as many first as last ones
    raised = made_later_s(rows, seen(blocked, 60.0))
    assert raised.tpot_p95_raised_s == pytest.approx(
        (percentile([row.tpot_s or 0.0 for row in rows], 95) or 0.0) - 0.01, abs=4e-4
    )
    assert raised.tpot_p95_raised_s > 0.001


def test_of_failed_requests_nothing_was_held_back_that_is_in_a_figure() -> None:
    rows = closed_loop(1, 3.0, 32, 0.01, [(0.3, 0.4)])
    assert made_later_s(rows, [Stall(0.4, 0.095)]).e2e_p95_raised_s > 0.03
    rows[0].ok, rows[0].e2e_s = False, 9.0  # given up long after
    assert made_later_s(rows, [Stall(0.4, 0.095)]) == NOTHING


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
    for told, measured, truth in zip(told_s(found), figures(rows), figures(true), strict=True):
        assert told >= 0
        # no more is left than a stall that no timer saw: it began behind one, and the next was late by less than counts
        assert measured - told - truth <= TICK_S + SHORTEST_S + 1e-5
    longest_s = max((to_s - from_s for from_s, to_s in blocked), default=0.0)
    assert found.tpot_p95_raised_s * (tokens - 1) <= longest_s + TICK_S
    if not blocked:
        assert found == NOTHING


@given(STALLS, STALLS)
def test_the_figures_of_two_processes_are_raised_by_what_either_held_back(
    first: list[tuple[float, float]], second: list[tuple[float, float]]
) -> None:
    """A stall of one does not hold back what another stamps at that moment."""
    rows, held = Rows(), HeldBack()
    for stalls in (first, second):
        ends_s = list(accumulate(sum(each) for each in stalls))
        blocked = [(end_s - long_s, end_s) for end_s, (_, long_s) in zip(ends_s, stalls, strict=True)]
        mine = answers(4, 300, 0.01, blocked)
        held += held_back(mine, seen(blocked, 12.0))
        rows += mine
    found, true = raised_by(rows, held), answers(8, 300, 0.01, [])
    for told, measured, truth in zip(told_s(found), figures(rows), figures(true), strict=True):
        most_s = TICK_S + SHORTEST_S + 2e-3  # the streams begin up to 1.25 ms apart
        assert -most_s <= measured - told - truth <= most_s


def test_a_first_chunk_that_lay_there_while_the_loop_stood_is_late() -> None:
    rows = [RequestRow(n, float(n), True, ttft_s=0.02 if n % 5 else 0.07) for n in range(20)]
    stalls = [Stall(n + 0.07, 0.045) for n in range(0, 20, 5)]
    late = pytest.approx(0.05)
    assert made_later_s(rows, stalls) == replace(NOTHING, ttft_p95_raised_s=late, ttft_p99_raised_s=late)
    assert made_later_s(rows, []) == NOTHING  # the server itself was slow


def test_a_gap_of_the_servers_own_is_not_the_clients() -> None:
    gaps = [10_000] * 20 + [200_000] + [10_000] * 20
    rows = [RequestRow(0, 0.0, True, ttft_s=0.01, gaps_us=gaps)]
    assert made_later_s(rows, [Stall(0.1, 0.006), Stall(0.55, 0.006)]).gap_p99_raised_s == pytest.approx(0, abs=1e-4)
    assert (
        made_later_s(rows, [Stall(0.412, 0.006)]).gap_p99_raised_s <= 0.011
    )  # a short stall does not make a long gap its own
    assert made_later_s(rows, [Stall(0.412, 0.19)]).gap_p99_raised_s > 0.1


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
