"""Was the client of a run the limit, by the log of a server whose truth is known? And how often was that told? Pure.

Used by `gating.py` and `run.py`. Nothing here is taken from what a client says of itself but the stamps of its
requests, each held against the same request in the server's log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from workers.load.ending import Z95

LATE_S, LATE_SHARE, SHARE = 0.01, 0.1, 0.95
"""Late is what is later than the first and than the second of what it distorts (a median of the server's). The third:
what has to be in flight of a closed loop."""


@dataclass(frozen=True)
class Told:
    """One request, by both sides: seconds on one monotonic clock."""

    sent_s: float
    first_s: float
    last_s: float
    """The client's stamps of the send, the first and the last chunk."""
    gaps_s: Sequence[float]
    arrived_s: float
    """Its last byte was in the server's socket, whenever that was read."""
    writes_s: Sequence[float]
    """The server's."""
    due_s: float | None = None
    """Of an open loop."""


def held_against(logged: Mapping[int, tuple[float, Sequence[float]]], said: Iterable[Sequence[Any]]) -> list[Told]:
    """Return requests by both sides: `truth.TruthServer.by_body` and `clients.said`, joined by their bodies."""
    return [
        Told(*stamps, arrived_s=logged[crc][0], writes_s=logged[crc][1], due_s=due_s) for crc, due_s, *stamps in said
    ]


def blame(told: Sequence[Told], streams: int) -> list[str]:
    """Return in what the client was the limit of a load of answers of one length: empty where it was in nothing.

    All streams together: their p99 gap, off the server's; their p95 of TTFT, E2EL and TPOT, above what it would be had
    chunks been stamped as they were written; of a closed loop the share of its streams that the server had to serve; of
    an open one how late requests (p99) came to the server.
    """
    gap = [later - before for each in told for before, later in pairwise(each.writes_s)]
    steps = max(len(told[0].writes_s) - 1, 1)
    ttft = [each.writes_s[0] - each.sent_s for each in told]
    e2e = [each.writes_s[-1] - each.sent_s for each in told]
    decode = [each.writes_s[-1] - each.writes_s[0] for each in told]
    # seconds off, what that distorts
    off = {
        "p99 gap": (abs(_p([gap for each in told for gap in each.gaps_s], 99) - _p(gap, 99)), gap),
        "p95 TTFT": (_p([each.first_s - each.sent_s for each in told], 95) - _p(ttft, 95), ttft),
        "p95 E2EL": (_p([each.last_s - each.sent_s for each in told], 95) - _p(e2e, 95), e2e),
        # by the time of an answer that it makes up
        f"p95 TPOT, times {steps}": (_p([each.last_s - each.first_s for each in told], 95) - _p(decode, 95), decode),
    }
    found = [
        f"{name} off by {by_s * 1000:.1f} ms" for name, (by_s, of) in off.items() if by_s > late_from_s(_p(of, 50))
    ]
    if any(each.due_s is not None for each in told):
        delay_s = _p([max(each.arrived_s - each.due_s, 0.0) for each in told if each.due_s is not None], 99)
        if delay_s > late_from_s(_p(ttft, 50)):
            found.append(f"requests came {delay_s * 1000:.1f} ms late (p99)")
    elif (share := in_flight(told, streams)) < SHARE:
        found.append(f"{share:.1%} in flight")
    return found


def late_from_s(distorted_s: float) -> float:
    """Return from where on a client is late by what distorts so many seconds."""
    return max(LATE_S, LATE_SHARE * distorted_s)


def in_flight(told: Sequence[Told], streams: int) -> float:
    """Return the share of the streams that the server had to serve, from the first that came to the last."""
    first_s, last_s = min(each.arrived_s for each in told), max(each.arrived_s for each in told)
    held_s = math.fsum(min(each.writes_s[-1], last_s) - each.arrived_s for each in told)
    return held_s / ((last_s - first_s) * streams)


@dataclass(frozen=True)
class Verdict:
    """Of one run."""

    was: bool
    """The client was the limit."""
    called: bool


def table(verdicts: Iterable[Verdict]) -> str:
    """Return how many of which kind there are, and the share that is right with its 95 % interval."""
    every = list(verdicts)
    counts = [sum(each == Verdict(was, called) for each in every) for was in (True, False) for called in (True, False)]
    right = counts[0] + counts[3]
    low, high = wilson(right, len(every))
    cells = " ".join(f"{count:10}" for count in counts)
    return f"{cells}   right: {right} of {len(every)}, {right / len(every):.1%} ({low:.1%} to {high:.1%})"


HEAD = " ".join(f"{words:>10}" for words in ("hit", "missed", "false", "rightly no"))
"""Of `table`: was the limit and called so, was and was not, was not and was, was not and was not."""


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share. Wilson, Journal of the American Statistical Association 22, 1927."""
    share, scale = right / of, 1 + Z95 * Z95 / of
    middle = (share + Z95 * Z95 / (2 * of)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / of + Z95 * Z95 / (4 * of * of))
    return middle - half, middle + half


def _p(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q))
