"""When a closed loop sends no more: its requests are used up, its time is over, or its metric is known well enough."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from contract.specs import METRICS, Precision
from workers.load.start_line import StartLine

LOOK_S = 0.25
FEWEST = 20
"""An interval from fewer values than this is not believed."""
Z95 = NormalDist().inv_cdf(0.975)

REQUESTS, TIME, PRECISION = "requests", "time", "precision"
"""What ended a level."""


@dataclass(frozen=True, slots=True)
class Stop:
    """When a level that is not ended by its number of requests ends."""

    seconds: float
    """At the latest, from the window's opening to the last send."""
    precision: Precision | None = None
    least: int = FEWEST
    """Requests that each process must have ended before its precision counts."""


def half_width(values: Sequence[float], metric: str) -> float | None:
    """Return half the width of the 95 % interval of `metric` over the metric itself; None where it is not known.

    Of a quantile: the order statistics whose ranks are 1.96 binomial deviations apart from its own (David and Nagaraja,
    "Order Statistics", 7.1; needs no distribution). Of the mean: 1.96 standard errors. Both take the values as
    independent; latencies of requests that ran side by side are not quite, so the true interval is somewhat wider.
    """
    if len(values) < FEWEST:
        return None
    share = METRICS[metric]
    if share is None:
        mean = fmean(values)
        return Z95 * stdev(values) / math.sqrt(len(values)) / mean if mean > 0 else None
    ordered = sorted(values)
    n = len(ordered)
    reach = Z95 * math.sqrt(n * share * (1 - share))
    low, high = math.floor(n * share - reach), math.ceil(n * share + reach)
    if low < 0 or high >= n:
        return None
    middle = ordered[min(int(n * share), n - 1)]
    return (ordered[high] - ordered[low]) / 2 / middle if middle > 0 else None


class Ending:
    """The rule at work in one process; with several, all end a precise level together."""

    def __init__(self, stop: Stop | None, started_s: float, together: StartLine | None) -> None:
        self.by = REQUESTS
        self._stop, self._together = stop, together
        self._deadline_s = math.inf if stop is None else started_s + stop.seconds
        self._latencies_s: list[float] = []
        self._precise = False

    def reached(self) -> bool:
        """Whether no further request is to be sent."""
        if self._precise:
            self.by = PRECISION
        elif time.monotonic() >= self._deadline_s:
            self.by = TIME
        else:
            return False
        return True

    def note(self, latency_s: float) -> None:
        """Take the latency of a request that has ended."""
        self._latencies_s.append(latency_s)

    async def watch(self) -> None:
        """Look from time to time whether the metric is known well enough; to be cancelled when the level is over."""
        if self._stop is None or self._stop.precision is None:
            return
        while not self._precise:
            await asyncio.sleep(LOOK_S)
            width = None
            if len(self._latencies_s) >= self._stop.least:
                width = half_width(self._latencies_s, self._stop.precision.metric)
            if width is None or width > self._stop.precision.within:
                continue
            self._precise = self._together is None or self._together.agreed("precise")
