"""When a closed loop sends no more: its requests are used up, its time is over, or its metric is known well enough."""

from __future__ import annotations

import asyncio
import math
import time
from bisect import insort
from dataclasses import dataclass
from statistics import NormalDist

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


class Estimate:
    """A metric of the values so far, and how well it is known. A value costs some microseconds, a look hardly anything:
    both happen in the measured window."""

    def __init__(self, metric: str) -> None:
        self._share = METRICS[metric]
        self._ordered: list[float] = []
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    @property
    def count(self) -> int:
        """Values so far."""
        return self._count

    def add(self, value: float) -> None:
        """Take a value. Mean and squared deviations: Welford, Technometrics 4, 1962."""
        self._count += 1
        if self._share is not None:
            insort(self._ordered, value)
            return
        before = value - self._mean
        self._mean += before / self._count
        self._squares += before * (value - self._mean)

    def half_width(self) -> float | None:
        """Return half the width of the metric's 95 % interval over the metric itself; None where it is not known.

        Of a quantile: the order statistics whose ranks are 1.96 binomial deviations apart from its own (David and
        Nagaraja, "Order Statistics", 7.1; needs no distribution). Of the mean: 1.96 standard errors. Both are for a
        number of values that does not hang on them: a level that ends at the first narrow interval is less sure than
        95 % (`benchmarks/stopping_truth.py`). And both take the values as independent; latencies of requests that ran
        side by side are not quite, so the true interval is somewhat wider.
        """
        n, share = self._count, self._share
        if n < FEWEST:
            return None
        if share is None:
            deviation = math.sqrt(max(self._squares, 0.0) / (n - 1))
            return Z95 * deviation / math.sqrt(n) / self._mean if self._mean > 0 else None
        reach = Z95 * math.sqrt(n * share * (1 - share))
        low, high = math.floor(n * share - reach), math.ceil(n * share + reach)
        if low < 0 or high >= n:
            return None
        middle = self._ordered[min(int(n * share), n - 1)]
        return (self._ordered[high] - self._ordered[low]) / 2 / middle if middle > 0 else None


class Ending:
    """The rule at work in one process; several end a precise level together, within `LOOK_S`: when each has known its
    part well enough once."""

    def __init__(self, stop: Stop | None, started_s: float, together: StartLine | None) -> None:
        self.by = REQUESTS
        self._stop, self._together = stop, together
        self._deadline_s = math.inf if stop is None else started_s + stop.seconds
        precision = None if stop is None else stop.precision
        self._known = None if precision is None else Estimate(precision.metric)
        self._of_first = precision is not None and precision.metric.endswith("_ttft_s")
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

    def note(self, first_s: float, last_s: float) -> None:
        """Take the times from the send of a request to the first and the last byte of its answer's body, if it was
        answered.

        They stand for TTFT (in a chat the chunk that names the role, which vLLM writes with the first token) and for
        E2EL (with the usage chunk and `[DONE]`): nothing is parsed in a window. So an answer that its digest will find
        to be no success counts here, too.
        """
        if self._known is not None:
            self._known.add(first_s if self._of_first else last_s)

    async def watch(self) -> None:
        """Look from time to time whether the metric is known well enough; to be cancelled when the level is over."""
        if self._stop is None or self._stop.precision is None or self._known is None:
            return
        said = False  # once and for all: an interval that widens again must not leave this process behind alone
        while not self._precise:
            await asyncio.sleep(LOOK_S)
            width = self._known.half_width() if self._known.count >= self._stop.least else None
            said = said or (width is not None and width <= self._stop.precision.within)
            if said:
                self._precise = self._together is None or self._together.agreed("precise")
