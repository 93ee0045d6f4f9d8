"""A Prometheus histogram: what it gained between two scrapes, its mean, and what its buckets can say of a percentile.

Pure. Used by `workers.metrics`, `workers.server_view` and `workers.measuring`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values observed since the server's start, or (`gained`) between two scrapes."""

    total: float = 0.0
    """Sum of the values, in the metric's own unit."""
    count: int = 0
    buckets: Mapping[float, int] = field(default_factory=dict)
    """Cumulative: how many values are at most the bound. The last bound is infinite."""

    @property
    def mean(self) -> float | None:
        """Mean of the values; None where there are none."""
        return self.total / self.count if self.count > 0 else None

    def percentile_le(self, percent: int) -> float | None:
        """Return the lowest bound that `percent` of the values do not exceed: the percentile is at most that.

        Infinite where only the last bucket reaches so far; None where nothing was observed.
        """
        if self.count <= 0:
            return None
        enough = (bound for bound in sorted(self.buckets) if 100 * self.buckets[bound] >= percent * self.count)
        return next(enough, math.inf)

    def highest_above(self) -> float | None:
        """Return the lower bound of the bucket that holds the highest value; None where nothing was observed."""
        lower, seen, highest = 0.0, 0, None
        for bound in sorted(self.buckets):
            if self.buckets[bound] > seen:
                highest, seen = lower, self.buckets[bound]
            lower = bound
        return highest


def gained(before: Histogram | None, after: Histogram | None) -> Histogram:
    """Return what a server observed between two scrapes: nothing where it has no such metric (None)."""
    before, after = before or Histogram(), after or Histogram()
    buckets = {bound: count - before.buckets.get(bound, 0) for bound, count in after.buckets.items()}
    return Histogram(after.total - before.total, after.count - before.count, buckets)
