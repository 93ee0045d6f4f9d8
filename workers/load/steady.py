"""The part of a level in which it was what it is called: all of its requests in flight, ramp and drain left out. Pure.

Whole-run figures (`workers.load.summary`) stand beside these: they are what `vllm bench serve` reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from contract.rows import STEADY_SHARE, RequestRow
from workers.load.summary import end_s, in_flight_from, percentile

STABLE_WITHIN = 0.1
"""A warm-up is over when its last round's tok/s differs from the one before by no more than this share."""


@dataclass(frozen=True, slots=True)
class Steady:
    """Figures of the steady window, with the field names of `contract.rows.PointRow`.

    Latencies are over successes that ended inside it once the opening burst was over, whenever they were sent: a
    stationary load has as many of each kind end in any window as begin there, while those that also began inside are
    the shorter ones. None where what is left of it then is shorter than the median E2EL, or no success ended in it.
    """

    steady_from_s: float
    """Since the window's opening."""
    steady_settled_s: float
    """When the opening burst was over: the last success ended of what was sent before the window began, or before any
    answer had ended: to a server that was filling up, and had much to prefill at once."""
    steady_to_s: float
    steady_completed: int | None
    """Successes that the latencies are of."""
    steady_tok_s: float
    """Tokens that arrived inside, by the stamps of their chunks, over its length; of successes."""
    steady_mean_e2e_s: float | None
    steady_p50_e2e_s: float | None
    steady_p95_e2e_s: float | None
    steady_p95_ttft_s: float | None
    steady_p95_tpot_s: float | None


def steady(requests: Sequence[RequestRow], concurrency: int | None) -> Steady | None:
    """Return what a level gave in its steady window; None where it never had one as long as its median E2EL.

    Of a closed loop the window is from the first to the last moment at which `STEADY_SHARE` of `concurrency` was in
    flight. An open loop (None) has no such number: there it is from the first answer's end to the last send.
    """
    window = _full(requests, concurrency) if concurrency is not None else _between(requests)
    median_s = percentile([row.e2e_s for row in requests if row.ok and row.e2e_s is not None], 50)
    if window is None or median_s is None or window[1] - window[0] < median_s:
        return None
    from_s, to_s = window
    settled_s = _settled_s(requests, from_s)
    long_enough = to_s - settled_s >= median_s
    inside = [row for row in requests if row.ok and settled_s < end_s(row) <= to_s] if long_enough else []
    tokens = sum(_tokens_between(row, from_s, to_s) for row in requests if row.ok)
    e2e = [row.e2e_s for row in inside if row.e2e_s is not None]
    return Steady(
        from_s,
        settled_s,
        to_s,
        len(inside) if long_enough else None,
        tokens / (to_s - from_s),
        fmean(e2e) if e2e else None,
        percentile(e2e, 50),
        percentile(e2e, 95),
        percentile([row.ttft_s for row in inside if row.ttft_s is not None], 95),
        percentile([row.tpot_s for row in inside if row.tpot_s is not None], 95),
    )


def stable(rates: Sequence[float]) -> bool:
    """Return whether the last two rounds of a warm-up had the same throughput."""
    return len(rates) > 1 and abs(rates[-1] - rates[-2]) <= STABLE_WITHIN * rates[-2]


def _full(requests: Sequence[RequestRow], concurrency: int) -> tuple[float, float] | None:
    """From the first to the last moment at which enough requests were in flight.

    Dips in between are in it: from an answer's end to the next send they are the client's, some tens of microseconds,
    and have a verdict of their own (`workers.load.limits`).
    """
    first, last, enough = None, None, False
    for at_s, count in in_flight_from(requests):
        if enough:
            last = at_s
        enough = count >= STEADY_SHARE * concurrency
        if enough and first is None:
            first = at_s
    return None if first is None or last is None else (first, last)


def _settled_s(requests: Sequence[RequestRow], from_s: float) -> float:
    ended = [row for row in requests if row.ok]
    opened_s = max(from_s, min(end_s(row) for row in ended))
    return max((end_s(row) for row in ended if row.sent_s < opened_s), default=from_s)


def _between(requests: Sequence[RequestRow]) -> tuple[float, float] | None:
    if not requests:
        return None
    first, last = min(end_s(row) for row in requests), max(row.sent_s for row in requests)
    return (first, last) if first < last else None


def _tokens_between(row: RequestRow, from_s: float, to_s: float) -> float:
    """Tokens of a request that arrived inside; a chunk holds as many as the others of its request."""
    if row.completion_tokens is None or not row.chunks or row.ttft_s is None:
        return 0.0
    at_s = row.sent_s + row.ttft_s
    if from_s <= at_s and end_s(row) <= to_s:
        return row.completion_tokens
    inside = int(from_s <= at_s <= to_s)
    for gap_us in row.gaps_us:
        at_s += gap_us / 1e6
        inside += from_s <= at_s <= to_s
    return row.completion_tokens * inside / row.chunks
