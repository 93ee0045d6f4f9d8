"""Was the client the limit of a level? Pure: from what the load processes say of themselves and from the requests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from contract.rows import ClientRow, RequestRow
from workers.load.summary import end_s, percentile

BUSY_SHARE = 0.9
"""A process that ran or waited for a core for so much of the window had no time left to be on time."""
LAG_S = 0.01
LAG_SHARE = 0.05
LATE_SHARE = 0.05
"""An event loop is late when its p99 lag is above both, the first and this share of the median latency, and it was late
for this share of the window: one hiccup in a short window is not the client's limit."""
JUDGED_FROM_S = 0.5
"""A shorter window holds too few timers and sends to tell a busy client from one hiccup: it is not judged."""
ACHIEVED_SHARE = 0.95
"""Less than this of the asked concurrency, while there was something left to send, and the level was not offered."""


def client_limits(clients: Sequence[ClientRow], requests: Sequence[RequestRow], concurrency: int | None) -> list[str]:
    """Return why the client, not the server, was the limit of a level; empty where it was not.

    `concurrency` is what a closed loop was asked for, None for an open one, whose requests have to be sent when due.
    """
    if max(map(end_s, requests), default=0.0) < JUDGED_FROM_S:
        return []
    found = []
    busiest = max((client.cpu_share + (client.wait_share or 0.0) for client in clients), default=0.0)
    if busiest >= BUSY_SHARE:
        found.append(f"a load process was busy or waiting for a core for {busiest:.0%} of the window")
    latency_s = percentile([row.e2e_s for row in requests if row.ok and row.e2e_s is not None], 50)
    late = (c.lag_p99_s or 0.0 for c in clients if c.late_share is None or c.late_share > LATE_SHARE)
    lag_s = max(late, default=0.0)
    if latency_s is not None and lag_s > max(LAG_S, LAG_SHARE * latency_s):
        found.append(f"a load process woke up {lag_s * 1000:.0f} ms late (p99), median latency {latency_s:.3g} s")
    delay_s = send_delay_s(requests)
    if delay_s is not None and latency_s is not None and delay_s > max(LAG_S, LAG_SHARE * latency_s):
        found.append(f"requests were sent {delay_s * 1000:.0f} ms after they were due (p99)")
    achieved = None if concurrency is None else achieved_share(requests, concurrency)
    if achieved is not None and achieved < ACHIEVED_SHARE:
        found.append(f"{achieved:.1%} of the asked concurrency was in flight while requests were left to send")
    return found


def send_delay_s(requests: Sequence[RequestRow]) -> float | None:
    """Return the 99th percentile of the seconds from due to sent; None for a closed loop."""
    return percentile([row.sent_s - row.due_s for row in requests if row.due_s is not None], 99)


def achieved_share(requests: Sequence[RequestRow], concurrency: int) -> float | None:
    """Return the time-weighted mean in flight from the first send to the last, over `concurrency`.

    None where no request followed another, so that there is no such time. Failed requests count: they were in flight.
    """
    if len(requests) <= concurrency:
        return None
    sends = [row.sent_s for row in requests]
    first_s, last_s = min(sends), max(sends)
    if last_s <= first_s:
        return None
    held = (min(row.sent_s + _busy_s(row), last_s) - row.sent_s for row in requests)
    return math.fsum(max(each, 0.0) for each in held) / ((last_s - first_s) * concurrency)


def _busy_s(row: RequestRow) -> float:
    """How long a request held its stream: to its last byte, which comes after its last chunk."""
    return max(row.e2e_s or 0.0, row.last_byte_s or 0.0)
