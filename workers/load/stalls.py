"""What stalls of the event loop that takes the stamps did to the figures made of them. Pure.

Used by `workers.load.client` when a window has closed; `workers.load.limits` judges by the outcome.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from contract.rows import RequestRow
from workers.load.summary import percentile_of_counts

TICK_S = 0.01
"""Between the timers by which a stall is seen: it lasted about half of that longer than its timer's lag."""
SHORTEST_S = 0.005
"""A shorter lag is none: with the half of a timer's period it is no later than what counts as late."""
AFTERWARDS_S = 0.005
"""So long after its timer was woken a stall's last reads are stamped."""


@dataclass(frozen=True, slots=True)
class Stall:
    """The event loop could not wake a timer when it was due."""

    woken_s: float
    """When it did, since the window's opening."""
    lag_s: float
    """How late that was."""

    @property
    def length_s(self) -> float:
        """How long it lasted, about."""
        return self.lag_s + TICK_S / 2


def stood_s(from_s: float, to_s: float, stalls: Sequence[Stall]) -> float:
    """Return for how long the event loop stood between two moments of its window, by its stalls (ascending)."""
    stood = 0.0
    for stall in stalls[bisect_left(stalls, from_s, key=lambda each: each.woken_s) :]:
        begun_s = stall.woken_s - stall.length_s
        if begun_s >= to_s:
            break
        stood += min(stall.woken_s, to_s) - max(begun_s, from_s)
    return stood


@dataclass(frozen=True, slots=True)
class HeldBack:
    """What stalls held back, in seconds: of each figure as it was stamped, and as it would have been without.

    A level's is that of its processes together: each has stalls of its own.
    """

    gaps: tuple[tuple[float, float], ...] = ()
    ttft: tuple[tuple[float, float], ...] = ()
    e2e: tuple[tuple[float, float], ...] = ()
    tpot: tuple[tuple[float, float], ...] = ()

    def __add__(self, other: HeldBack) -> HeldBack:
        return HeldBack(self.gaps + other.gaps, self.ttft + other.ttft, self.e2e + other.e2e, self.tpot + other.tpot)


@dataclass(frozen=True, slots=True)
class Raised:
    """By how much stalls raised figures of all the requests they are taken of, in seconds; columns of
    `contract.rows.PointRow`."""

    gap_p99_raised_s: float
    ttft_p95_raised_s: float
    ttft_p99_raised_s: float
    e2e_p95_raised_s: float
    e2e_p99_raised_s: float
    tpot_p95_raised_s: float


def held_back(requests: Sequence[RequestRow], stalls: Sequence[Stall]) -> HeldBack:
    """Return what a process's stalls (ascending) held back of its successes: a level's figures are of those alone.

    In each stream a stall holds back the first chunk that is stamped as it ends, by its length at the most. Without it
    that gap, or that TTFT, would have been so much shorter. Chunks behind it in the same stall waited less; E2EL and
    TPOT are longer where the last chunk is one of them. (A late first chunk makes a TPOT look shorter. That is not made
    good, so it hides nothing.)
    """
    gaps: list[tuple[float, float]] = []
    firsts: list[tuple[float, float]] = []
    ends: list[tuple[float, float]] = []
    per_token: list[tuple[float, float]] = []
    for row in requests:
        if not row.ok:
            continue
        late_s = 0.0
        for index, stall in _held_back(row, stalls):
            value = row.gaps_us[index - 1] / 1e6 if index else row.ttft_s or 0.0
            held_s = min(stall.length_s, value)
            (gaps if index else firsts).append((value, value - held_s))
            late_s = _last_late_s(row, index, stall, held_s)
        if late_s and row.e2e_s is not None:
            ends.append((row.e2e_s, row.e2e_s - late_s))
        if late_s and row.tpot_s is not None and row.completion_tokens is not None:
            per_token.append((row.tpot_s, max(row.tpot_s - late_s / (row.completion_tokens - 1), 0.0)))
    return HeldBack(tuple(gaps), tuple(firsts), tuple(ends), tuple(per_token))


def raised_by(requests: Sequence[RequestRow], held: HeldBack) -> Raised:
    """Return by how much figures of these requests' successes are higher for what was held back of them."""
    ok = [row for row in requests if row.ok]
    gaps_us = Counter(chain.from_iterable(row.gaps_us for row in ok) if held.gaps else [])
    ttft = Counter(row.ttft_s for row in ok if row.ttft_s is not None)
    e2e = Counter(row.e2e_s for row in ok if row.e2e_s is not None)
    return Raised(
        _raised_by(Counter({us / 1e6: times for us, times in gaps_us.items()}), held.gaps, 99),
        _raised_by(ttft, held.ttft, 95),
        _raised_by(ttft, held.ttft, 99),
        _raised_by(e2e, held.e2e, 95),
        _raised_by(e2e, held.e2e, 99),
        _raised_by(Counter(row.tpot_s for row in ok if row.tpot_s is not None), held.tpot, 95),
    )


def _last_late_s(row: RequestRow, index: int, stall: Stall, held_s: float) -> float:
    """Return by how much a stall that held back chunk `index` for `held_s` held back the last one: each that came in
    it waited a mean gap less than the one before it."""
    behind = len(row.gaps_us) - index
    if not behind:
        return held_s
    lasted_s = sum(row.gaps_us) / 1e6
    if row.sent_s + (row.ttft_s or 0.0) + lasted_s > stall.woken_s + AFTERWARDS_S:
        return 0.0
    return max(held_s - behind * lasted_s / len(row.gaps_us), 0.0)


def _held_back(row: RequestRow, stalls: Sequence[Stall]) -> Iterator[tuple[int, Stall]]:
    """Yield (index of a request's chunk, the stall that held it back)."""
    if row.ttft_s is None:
        return
    first_s = row.sent_s + row.ttft_s
    at = bisect_left(stalls, first_s - AFTERWARDS_S, key=lambda stall: stall.woken_s)
    if at == len(stalls) or stalls[at].woken_s - stalls[at].lag_s > first_s + sum(row.gaps_us) / 1e6:
        return
    stamps = [first_s + us / 1e6 for us in accumulate(row.gaps_us, initial=0)]
    taken = -1
    for stall in stalls[at:]:
        if stall.woken_s - stall.lag_s > stamps[-1]:
            return
        index = bisect_left(stamps, stall.woken_s - stall.lag_s)
        if index > taken and stamps[index] <= stall.woken_s + AFTERWARDS_S:
            taken = index
            yield index, stall


def _raised_by(values: Counter[float], changed: Sequence[tuple[float, float]], q: float) -> float:
    """Return the `q`-th percentile of the values less what it is where some, as (before, after), are changed."""
    if not changed:
        return 0.0
    kept = values - Counter(before for before, _ in changed) + Counter(after for _, after in changed)
    return (percentile_of_counts(values, q) or 0.0) - (percentile_of_counts(kept, q) or 0.0)
