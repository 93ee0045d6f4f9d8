"""The near-full-context ladder ends where the engine says: levels beyond the planned ones. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from contract.specs import Point
from orchestrator import sizing
from orchestrator.search import Rows, Step


@dataclass(frozen=True, slots=True)
class PastThePool:
    """A ladder ends at the first level past what the pool holds; how large that is, the engine says only once it runs.

    Not past the engine's own KV concurrency: with sliding windows more are held at once than it counts.
    """

    points_at: Callable[[float], tuple[Point, ...]]
    holds: Callable[[int], int]
    """Requests at once that so many blocks hold, the null block among them."""
    top: int
    """The highest planned level."""

    @property
    def at_most(self) -> int:
        """Only the engine can tell."""
        return 0

    @property
    def estimate_s(self) -> float:
        """None are expected."""
        return 0.0

    def next(self, rows: Rows) -> Step:
        """Return the levels that are missing, where the pool is larger than was foreseen."""
        blocks = max((row.engine_num_blocks or 0 for row in rows.values()), default=0)
        levels = [level for level in sizing.levels_past(self.holds(blocks)) if level > self.top]
        rounds = zip(*(self.points_at(level) for level in levels), strict=True)
        return Step(tuple(point for points in rounds for point in points if point.id not in rows))
