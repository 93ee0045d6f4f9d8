"""What a load level adds up to, with the field names of `contract.rows.PointRow`.

Called by `workers.measuring`, `workers.point_rows` and the command line. Pure; it must never let a failed request into
a latency or a throughput, nor show 0 where nothing was measured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import TypeVar

from contract.rows import RequestRow

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """One load level. Latencies are over successes; whatever needs a success is None where there is none."""

    completed: int
    failed: int
    duration_s: float
    mean_e2e_s: float | None
    p50_e2e_s: float | None
    p95_e2e_s: float | None
    p99_e2e_s: float | None
    mean_ttft_s: float | None
    p50_ttft_s: float | None
    p95_ttft_s: float | None
    mean_tpot_s: float | None
    """Over successes of more than one token."""
    p50_tpot_s: float | None
    p95_tpot_s: float | None
    p99_ttft_s: float | None
    p50_icl_s: float | None
    """Inter-chunk latency, over the gaps of all successes together."""
    p95_icl_s: float | None
    p99_icl_s: float | None
    tokens_per_chunk: float | None
    """Over successes. From 1 on, gaps between chunks are no longer gaps between tokens."""
    qps: float | None
    """Successes / duration_s."""
    tok_s: float | None
    """Completion tokens of successes / duration_s."""
    total_tok_s: float | None
    """Prompt and completion tokens of successes / duration_s; None where a server left prompt tokens out."""
    mean_prompt_tokens: float | None
    """Over successes, by `usage`; as `total_tok_s` None where a server left prompt tokens out."""
    mean_completion_tokens: float | None
    achieved_concurrency: float | None
    """Time-weighted mean of requests in flight over the window, failed ones included; None for an empty window."""
    most_in_flight: int
    """At one moment."""


def summarize(requests: Sequence[RequestRow], duration_s: float) -> LoadSummary:
    """Return the summary of one load level that lasted `duration_s` seconds, ramp and drain included.

    Percentiles as numpy's default (linear interpolation), successes only, as in `vllm bench serve`; throughput is over
    the same duration as there. Different: bench puts TPOT at 0 for one-token answers (here they have none), shows 0.0
    where nothing succeeded (here None), and counts concurrency as the peak of one-second buckets (here the integral of
    requests in flight over the window, so that by Little's law it equals qps * mean time to the last byte when all
    succeed).
    """
    successes = [row for row in requests if row.ok]
    e2e = _present(row.e2e_s for row in successes)
    ttft = _present(row.ttft_s for row in successes)
    tpot = _present(row.tpot_s for row in successes)
    prompt_tokens = _present(row.prompt_tokens for row in successes)
    completion_tokens = sum(row.completion_tokens or 0 for row in successes)
    total_tokens = completion_tokens + sum(prompt_tokens) if len(prompt_tokens) == len(successes) else None
    gaps_us = sorted(gap for row in successes for gap in row.gaps_us)
    chunks = sum(row.chunks for row in successes)
    rated = bool(successes) and duration_s > 0
    return LoadSummary(
        completed=len(successes),
        failed=len(requests) - len(successes),
        duration_s=duration_s,
        mean_e2e_s=mean(e2e),
        p50_e2e_s=percentile(e2e, 50),
        p95_e2e_s=percentile(e2e, 95),
        p99_e2e_s=percentile(e2e, 99),
        mean_ttft_s=mean(ttft),
        p50_ttft_s=percentile(ttft, 50),
        p95_ttft_s=percentile(ttft, 95),
        mean_tpot_s=mean(tpot),
        p50_tpot_s=percentile(tpot, 50),
        p95_tpot_s=percentile(tpot, 95),
        p99_ttft_s=percentile(ttft, 99),
        p50_icl_s=_seconds(percentile(gaps_us, 50)),
        p95_icl_s=_seconds(percentile(gaps_us, 95)),
        p99_icl_s=_seconds(percentile(gaps_us, 99)),
        tokens_per_chunk=completion_tokens / chunks if chunks else None,
        qps=len(successes) / duration_s if rated else None,
        tok_s=completion_tokens / duration_s if rated else None,
        total_tok_s=total_tokens / duration_s if rated and total_tokens is not None else None,
        mean_prompt_tokens=mean(prompt_tokens) if total_tokens is not None else None,
        mean_completion_tokens=completion_tokens / len(successes) if successes else None,
        achieved_concurrency=mean_in_flight(requests, duration_s),
        most_in_flight=most_in_flight(requests),
    )


def mean_in_flight(requests: Iterable[RequestRow], duration_s: float) -> float | None:
    """Return the time-weighted mean of requests in flight over [0, duration_s] seconds, None for an empty window.

    A request is in flight from `sent_s` to its last byte, cut to the window. The integral of the number in flight (what
    a sweep over sends and ends adds up) is the sum of these times.
    """
    if duration_s <= 0:
        return None
    held = (min(end_s(row), duration_s) - max(row.sent_s, 0.0) for row in requests if was_in_flight(row))
    return math.fsum(max(each, 0.0) for each in held) / duration_s


def most_in_flight(requests: Iterable[RequestRow]) -> int:
    """Return the highest number of requests in flight at one moment; one that ends when another begins makes room."""
    return max((count for _, count in in_flight_from(requests)), default=0)


def in_flight_from(requests: Iterable[RequestRow]) -> Iterator[tuple[float, int]]:
    """Yield (moment, requests in flight from it on) at every send and end, by time: an event sweep."""
    count = 0
    held = (row for row in requests if was_in_flight(row))
    for at_s, change in sorted(event for row in held for event in ((row.sent_s, 1), (end_s(row), -1))):
        count += change
        yield at_s, count


def was_in_flight(row: RequestRow) -> bool:
    """Return whether a request ever held anything of the server.

    One of an open loop that got no connection did not. In a closed loop connecting anew is a part of a stream's time in
    flight.
    """
    return row.due_s is None or row.connect_s is not None


def end_s(row: RequestRow) -> float:
    """Return when a request ended, in seconds since the window's opening: at its last byte, which comes after its last
    chunk; a failed one when it was given up."""
    return row.sent_s + _lasted_s(row)


def held_s(row: RequestRow) -> float:
    """Return how long a request was in flight, and so held its stream."""
    return _lasted_s(row) if was_in_flight(row) else 0.0


def _lasted_s(row: RequestRow) -> float:
    return max(row.e2e_s or 0.0, row.last_byte_s or 0.0)


def percentile(values: Sequence[float], q: float) -> float | None:
    """Return the `q`-th percentile (0 to 100) with linear interpolation between ranks; None for no values.

    Method 7 of Hyndman and Fan, "Sample Quantiles in Statistical Packages" (1996): numpy's default.
    """
    if not values:
        return None
    ordered = sorted(values)
    below, above, share = _ranks(len(ordered), q)
    return ordered[below] + (ordered[above] - ordered[below]) * share


def percentile_of_counts(counts: Mapping[float, int], q: float) -> float | None:
    """Return `percentile` of values that come as often as told (1 or more): quick where few differ, as gaps in µs."""
    ordered = sorted(counts)
    behind = list(accumulate(counts[value] for value in ordered))
    if not ordered:
        return None
    below, above, share = _ranks(behind[-1], q)
    low, high = (ordered[bisect_right(behind, rank)] for rank in (below, above))
    return low + (high - low) * share


def _ranks(number: int, q: float) -> tuple[int, int, float]:
    """The two ranks (from 0) that a percentile lies between, and where."""
    rank = (number - 1) * q / 100
    below = min(int(rank), number - 1)
    return below, min(below + 1, number - 1), rank - below


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None for no values."""
    return fmean(values) if values else None


def _seconds(us: float | None) -> float | None:
    return None if us is None else us / 1e6


def _present(values: Iterable[_Number | None]) -> list[_Number]:
    return [value for value in values if value is not None]
