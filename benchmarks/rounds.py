"""How the requests of a closed loop follow one another, by a client's own stamps. Pure; by `against_vllm_bench.py`.

Which answer's end let a client send which request it does not say, so ends, sends and first tokens are each sorted, and
of n in flight the send number k + n is held against the end number k: it cannot come before it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stamps:
    """One request, in seconds of one clock: when it was sent, and its first and last chunk that carries a choice."""

    sent_s: float
    first_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How soon a client had something on its streams again, in seconds.

    The means add up: `mean_idle_s` is `mean_turnaround_s` and the mean TTFT of the requests after the first round (of
    as many as are in flight), where its first tokens come before all others. Of two clients that differ in their pace
    alone TTFT and turnaround differ by the same in opposite directions, and idle does not.
    """

    turnaround_s: float
    """Median over k of send k + n less end k: from an answer's last token (the server has yet to end it) to the request
    that takes its stream. The client's delay is in it, and what comes after it is TTFT."""
    mean_turnaround_s: float
    idle_s: float
    """Median over k of first token k + n less end k: what a stream stands without tokens between two answers, wherever
    between them the client's stamp of the send lies."""
    mean_idle_s: float
    start_s: float
    """Last less first send of the first round: what the client takes to have all its streams busy. No end is in it."""
    spread_s: float | None
    """Median of last less first send over the whole rounds after the first, each n consecutive sends: rounds only where
    all answers are of one length. How far apart the server let the ends lie is in it, and goes on from round to round.
    None where no round is whole."""


def pace(requests: Sequence[Stamps], in_flight: int) -> Pace | None:
    """Return the pace of a closed loop with so many requests in flight; None where no request followed another."""
    if len(requests) <= in_flight:
        return None
    sends, firsts, ends = (
        sorted(stamps) for stamps in zip(*((each.sent_s, each.first_s, each.end_s) for each in requests), strict=True)
    )
    turnarounds = [send - end for send, end in zip(sends[in_flight:], ends, strict=False)]
    idles = [first - end for first, end in zip(firsts[in_flight:], ends, strict=False)]
    whole = range(in_flight, len(sends) - in_flight + 1, in_flight)
    spreads = [sends[at + in_flight - 1] - sends[at] for at in whole]
    return Pace(
        statistics.median(turnarounds),
        statistics.fmean(turnarounds),
        statistics.median(idles),
        statistics.fmean(idles),
        sends[in_flight - 1] - sends[0],
        statistics.median(spreads) if spreads else None,
    )
