"""A search along one axis of levels (a concurrency, a rate), its repeats in rounds.

The first round searches with one repeat a level, the second repeats all its levels, one after the other, so that a
drift of the server falls on all levels alike; what the repeats then say differently is searched again. Further rounds
do the same with those levels whose repeats can change the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from contract.rows import MEASURED, PointRow
from contract.specs import Point
from orchestrator.search import Rows, Step
from orchestrator.search.bisection import halvings

Tried: TypeAlias = Mapping[float, Sequence[PointRow]]
"""The rows of every level that was tried, by level in ascending order; failed ones among them."""
Propose: TypeAlias = Callable[[Tried], float | None]
"""The next level to try, from those tried; None: the search is over. It never names a level that was tried."""
Matter: TypeAlias = Callable[[Tried], Collection[float]]
"""The levels, of those tried, on whose repeats the answer hangs."""
ALL_REPEATED = 2
"""Repeats of every level: without them there is no noise to know, nor a drift to see."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """See the module. Carries out what `propose` asks for, within `most_levels`."""

    points_at: Callable[[float], tuple[Point, ...]]
    """The repeats of a level, with their ids."""
    axis: str
    """The column of a row that holds its level."""
    propose: Propose
    coarse: tuple[float, ...]
    """The doublings that `propose` may ask for before it halves."""
    matter: Matter
    """Which levels get more than `ALL_REPEATED` repeats."""

    @property
    def most_levels(self) -> int:
        """Room to halve two brackets: one repeat may have pointed at the wrong one."""
        return len(self.coarse) + 2 * halvings()

    @property
    def at_most(self) -> int:
        """All repeats of so many levels."""
        return self.most_levels * len(self.points_at(self.coarse[0]))

    @property
    def estimate_s(self) -> float:
        """Of the coarse levels: few of them are needed in full, which pays for those between."""
        return sum(point.estimate_s for level in self.coarse for point in self.points_at(level))

    def next(self, rows: Rows) -> Step:
        """Return the rest of a round that was begun, else the next level, else the next round.

        Levels that could not be measured are not repeated.
        """
        asked = self._asked(rows)
        tried = {level: [rows[p.id] for p in points if p.id in rows] for level, points in asked.items()}
        matter = self.matter(tried)
        repeated = [
            points if level in matter else points[:ALL_REPEATED]
            for level, points in asked.items()
            if any(row.status == MEASURED for row in tried[level])
        ]
        begun = max((r for points in asked.values() for r, p in enumerate(points) if p.id in rows), default=0)
        due = (points[r] for r in range(begun + 1) for points in repeated if r < len(points))
        owed = tuple(point for point in due if point.id not in rows)
        if owed:
            return Step(owed)
        level = self.propose(tried) if len(tried) < self.most_levels else None
        if level is not None:
            return Step(self.points_at(level)[:1])
        return Step(tuple(points[begun + 1] for points in repeated if begun + 1 < len(points)))

    def _asked(self, rows: Rows) -> dict[float, tuple[Point, ...]]:
        """The points of every level of which there is a row, ascending."""
        levels = sorted({level for row in rows.values() if (level := getattr(row, self.axis)) is not None})
        asked = {level: self.points_at(level) for level in levels}
        return {level: points for level, points in asked.items() if any(point.id in rows for point in points)}
