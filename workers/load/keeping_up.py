"""Does a server keep up with an open loop? Pure: from when the same requests were sent and when they ended.

Counting what is sent and what ends between two moments does not tell it: under Poisson arrivals, or on a ramp, a server
without any limit ends fewer than are sent while more are in flight at the second moment than at the first. So the
requests are the same on both sides: those of the level's first quarter and of its last. If the last were in flight
longer than the first, fewer ended a second than were sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from contract.rows import KEEPS_UP, RequestRow

LEAST_IN_A_QUARTER = 5
MARGIN = 4.0
"""Standard errors that a verdict keeps from the border."""
STAMP_S = 1e-6
"""Times closer than this are the same."""


@dataclass(frozen=True, slots=True)
class KeepingUp:
    """Field names of `contract.rows.PointRow`."""

    sent_qps: float
    """From the middle of the first quarter's sends to that of the last quarter's."""
    ended_qps: float | None
    """Of the same requests, between the same middles of their ends; None where the last quarter did not end later."""
    keeps_up: bool | None
    """Whether that is at least `KEEPS_UP` of what was sent; None within noise."""


def keeping_up(requests: Sequence[RequestRow]) -> KeepingUp | None:
    """Return how fast an open loop's requests were sent and ended; None with too few successes to tell.

    With E the mean E2EL of a quarter and S the mean of its sends, ended / sent = (S4 - S1) / (S4 + E4 - S1 - E1), so
    the border is at E4 - E1 = (1 / KEEPS_UP - 1) (S4 - S1). A verdict needs E4 - E1 to be `MARGIN` standard errors from
    the border, and a queue (first come, first served) that is fed the same sends to agree. It keeps up only where the
    wait of a queue that can do `KEEPS_UP` of what was sent grew no less; it does not only where the requests of the
    last quarter waited longer than in a queue that can do just what was sent. So neither bursts of the arrivals nor
    their lulls are taken for the server's doing.
    """
    rows = sorted((row for row in requests if row.ok and row.e2e_s is not None), key=lambda row: row.sent_s)
    quarter = len(rows) // 4
    if quarter < LEAST_IN_A_QUARTER:
        return None
    sends, times = [row.sent_s for row in rows], [row.e2e_s or 0.0 for row in rows]
    first, last = slice(0, quarter), slice(len(rows) - quarter, None)
    apart = len(rows) - quarter
    sent_s, grown_s = fmean(sends[last]) - fmean(sends[first]), fmean(times[last]) - fmean(times[first])
    if sent_s <= 0:
        return None
    noise_s = MARGIN * math.sqrt((variance(times[first]) + variance(times[last])) / quarter)
    border_s = (1 / KEEPS_UP - 1) * sent_s
    offered = (len(rows) - 1) / (sends[-1] - sends[0])
    slower, equal = waits_s(sends, KEEPS_UP * offered), waits_s(sends, offered)
    verdict = None
    if grown_s + noise_s <= border_s and grown_s <= fmean(slower[last]) - fmean(slower[first]):
        verdict = True
    elif grown_s - noise_s > border_s and fmean(times[last]) - min(times) > fmean(equal[last]) + STAMP_S:
        verdict = False
    ended_s = sent_s + grown_s
    return KeepingUp(apart / sent_s, apart / ended_s if ended_s > 0 else None, verdict)


def waits_s(sends: Sequence[float], per_s: float) -> list[float]:
    """Return how long each request waits in a queue that serves one after the other, `per_s` a second.

    Lindley, "The theory of queues with a single server" (1952).
    """
    waits, free_s = [], -math.inf
    for sent_s in sends:
        begun_s = max(sent_s, free_s)
        waits.append(begun_s - sent_s)
        free_s = begun_s + 1 / per_s
    return waits
