"""Was the client the limit of a level, and what did it add? Pure: from what load processes and requests say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from contract.failures import FailureClass
from contract.lateness import LAG, RAISED, SLIP, in_an_answer, in_ms, named_s
from contract.rows import JUDGED_FROM_S, ClientRow, RequestRow
from workers.load.plan import LoadResult
from workers.load.stalls import TICK_S
from workers.load.summary import end_s, held_s, percentile

BUSY_SHARE = 0.9
"""A process that ran or waited for a core for so much of the window had no time left to be on time."""
LATE_S = 0.01
LATE_SHARE = 0.1
"""The client is late by more than both: the first, and this share of what that distorts (the median gap between
chunks, the median TTFT or E2EL). TPOT is held against both by the time of an answer that it makes up."""
ACHIEVED_SHARE = 0.95
"""Less than this of the streams in flight, while their processes had something left to send, and the level was not
offered."""
LITTLE_SHARE = 0.05
"""The two counts of time in flight may differ by this share, and by the time between two timers for every request."""


def client_limits(result: LoadResult) -> list[str]:
    """Return why the client, not the server, was the limit of a level; empty where it was not.

    Of a window below `JUDGED_FROM_S` only that is told which no window is too short for: requests that this host had no
    socket for.
    """
    clients, requests, share = result.clients, result.requests, result.achieved_share
    found = _sockets(requests)
    if max(map(end_s, requests), default=0.0) < JUDGED_FROM_S:
        return found
    busiest = max((client.cpu_share + (client.wait_share or 0.0) for client in clients), default=0.0)
    if busiest >= BUSY_SHARE:
        found.append(f"a load process was busy or waiting for a core for {busiest:.0%} of the window")
    ok = [row for row in requests if row.ok]
    found.extend(_stalls(result, ok))
    ttft_s = percentile([row.ttft_s for row in ok if row.ttft_s is not None], 50)
    delay_s = send_delay_s(requests)
    if delay_s is not None and ttft_s is not None and delay_s > _late_from_s(ttft_s):
        found.append(f"requests were sent {delay_s * 1000:.0f} ms after they were due (p99)")
    if share is not None and share < ACHIEVED_SHARE:
        found.append(f"{share:.1%} of the streams were in flight while their processes had requests left to send")
    return [*found, *_little(clients, requests)]


def added_s(result: LoadResult) -> dict[str, float]:
    """Return what the client added to a level's figures where that is to be named, whether it was the limit or not:
    seconds by the columns of `contract.lateness`."""
    tokens = _tokens([row for row in result.requests if row.ok])
    return named_s([result.raised], RAISED, tokens) | named_s(result.clients, {**SLIP, **LAG}, tokens)


def send_delay_s(requests: Sequence[RequestRow]) -> float | None:
    """Return the 99th percentile of the seconds from due to sent, connecting left out; None for a closed loop."""
    late = [row.sent_s - (row.connect_s or 0.0) - row.due_s for row in requests if row.due_s is not None]
    return percentile(late, 99)


def connecting_s(requests: Sequence[RequestRow]) -> float | None:
    """Return the 99th percentile of the seconds that an open loop's requests waited for their connections; None for a
    closed loop, and where none got one."""
    return percentile([row.connect_s for row in requests if row.connect_s is not None], 99)


def achieved_share(requests: Sequence[RequestRow], streams: int) -> float | None:
    """Return one process's time-weighted mean in flight from the window's opening to its last send, over `streams`.

    None where no request followed another, so that there is no such time. Failed requests count: they were in flight.
    A process that came late to the window had its streams idle until then. Not of several processes together: where
    lengths are drawn, one of them has sent its last before the others, and the client is not at fault that its streams
    are idle.
    """
    if len(requests) <= streams:
        return None
    last_s = max(row.sent_s for row in requests)
    if last_s <= 0:
        return None
    held = (min(end_s(row), last_s) - row.sent_s for row in requests)
    return math.fsum(max(each, 0.0) for each in held) / (last_s * streams)


def _stalls(result: LoadResult, ok: Sequence[RequestRow]) -> Iterator[str]:
    """By the figures of all processes together: those are the level's.

    Not by the p99s of TTFT and E2EL, which are noted: of few requests such a p99 is one or two of them.
    """
    raised = result.raised
    tokens = _tokens(ok)
    distorted: tuple[tuple[str, list[float], float], ...] = (
        ("gap_p99_raised_s", [us / 1e6 for row in ok for us in row.gaps_us], 1.0),
        ("ttft_p95_raised_s", [row.ttft_s for row in ok if row.ttft_s is not None], 1.0),
        ("e2e_p95_raised_s", [row.e2e_s for row in ok if row.e2e_s is not None], 1.0),
        ("tpot_p95_raised_s", [row.tpot_s for row in ok if row.tpot_s is not None], in_an_answer(tokens)),
    )
    for column, values, times in distorted:
        raised_s, median_s = getattr(raised, column), percentile(values, 50)
        if median_s is not None and raised_s * times > _late_from_s(median_s * times):
            yield RAISED[column].format(n=in_ms(raised_s))


def _tokens(ok: Sequence[RequestRow]) -> float | None:
    """Return the tokens of an answer, as the median has."""
    return percentile([row.completion_tokens for row in ok if row.completion_tokens is not None], 50)


def _late_from_s(distorted_s: float) -> float:
    return max(LATE_S, LATE_SHARE * distorted_s)


def _sockets(requests: Sequence[RequestRow]) -> list[str]:
    """Which of the host's limits it was, the first such request says (`workers.load.endpoint.NO_SOCKET`)."""
    without = [row.failure_message for row in requests if row.failure_class == FailureClass.CLIENT_SOCKETS]
    return [f"{len(without)} requests got no connection: {without[0]}"] if without else []


def _little(clients: Sequence[ClientRow], requests: Sequence[RequestRow]) -> list[str]:
    """Little's law: what the processes counted in flight, integrated, is the sum of the requests' times in flight."""
    counted = [client.held_s for client in clients if client.held_s is not None]
    if len(counted) < len(clients):
        return []
    counted_s, stamped_s = math.fsum(counted), math.fsum(map(held_s, requests))
    if abs(counted_s - stamped_s) <= LITTLE_SHARE * stamped_s + TICK_S * len(requests):
        return []
    return [f"requests were in flight for {counted_s:.3g} s by counting and for {stamped_s:.3g} s by their stamps"]
