"""Which stamps were late because the event loop that takes them had stalled. Pure.

Used by `workers.load.client` when a window has closed; `workers.load.limits` judges by the counts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from contract.rows import RequestRow
from workers.load.summary import percentile

TICK_S = 0.01
"""Between the timers by which a stall is seen: a stall lasted about half of it longer than its timer's lag."""
LATE_S = 0.01
LATE_SHARE = 0.1
"""A stamp is late from both on: the first, and this share of what it distorts (the median gap, the median TTFT)."""
SHORTEST_S = LATE_S - TICK_S / 2
"""A shorter lag cannot have made a stamp late."""
AFTERWARDS_S = 0.005
"""So long after its timer was woken a stall's last reads are stamped."""


@dataclass(frozen=True, slots=True)
class Stall:
    """The event loop could not wake a timer when it was due."""

    woken_s: float
    """When it did, since the window's opening."""
    lag_s: float
    """How late that was."""


def late_from_s(distorted_s: float) -> float:
    """Return from how much on lateness counts, for a median of what it distorts."""
    return max(LATE_S, LATE_SHARE * distorted_s)


def late_stamps(requests: Sequence[RequestRow], stalls: Sequence[Stall]) -> tuple[int, int]:
    """Return how many gaps between chunks, and how many first chunks, stalls of their process made too long or late.

    Those that are longer than the median by what counts as late, and whose end was stamped as a stall of at least that
    length was over: the chunk may have lain there since the stall began. `stalls` by time.
    """
    gaps_s = percentile([gap for row in requests for gap in row.gaps_us], 50)
    ttft_s = percentile([row.ttft_s for row in requests if row.ok and row.ttft_s is not None], 50)
    if not stalls or ttft_s is None:
        return 0, 0
    typical_s = (gaps_s or 0.0) / 1e6
    long_gaps = _ends_of_gaps(requests, typical_s + late_from_s(typical_s))
    firsts = (r.sent_s + r.ttft_s for r in requests if r.ttft_s is not None and r.ttft_s > ttft_s + late_from_s(ttft_s))
    return _in_stalls(long_gaps, stalls, late_from_s(typical_s)), _in_stalls(firsts, stalls, late_from_s(ttft_s))


def _ends_of_gaps(requests: Sequence[RequestRow], longer_than_s: float) -> Iterator[float]:
    for row in requests:
        if max(row.gaps_us, default=0) > longer_than_s * 1e6:
            at_s = row.sent_s + (row.ttft_s or 0.0)
            for gap_us in row.gaps_us:
                at_s += gap_us / 1e6
                if gap_us > longer_than_s * 1e6:
                    yield at_s


def _in_stalls(stamps_s: Iterator[float], stalls: Sequence[Stall], least_s: float) -> int:
    long = [stall for stall in stalls if stall.lag_s + TICK_S / 2 >= least_s]
    woken = [stall.woken_s + AFTERWARDS_S for stall in long]
    found = 0
    for stamp_s in stamps_s:
        at = bisect_left(woken, stamp_s)
        found += at < len(long) and long[at].woken_s - long[at].lag_s <= stamp_s
    return found
