"""An anchor: one level that is measured again and again while a session lives, so that its drift shows. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from contract.rows import MEASURED
from contract.specs import Point, Purpose
from orchestrator.search import Rows, Step

SHARE = 0.1
"""Of the time that a session's load takes: what its anchors may take."""
FEWEST = 2
"""With fewer there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Anchors:
    """The first comes before all other load; each further one once the others' time pays for it."""

    point_at: Callable[[int], Point]
    """The n-th reading of the anchor, with its id."""

    @property
    def at_most(self) -> int:
        """Not announced: how many there are follows from how long the others take."""
        return 0

    @property
    def estimate_s(self) -> float:
        """Within the roughness of the others' estimates."""
        return 0.0

    def next(self, rows: Rows) -> Step:
        """Return the next reading, ahead of all else, if it is due."""
        point = next(point for n in itertools.count() if (point := self.point_at(n)).id not in rows)
        if point.repeat and not self._due(rows):
            return Step()
        return Step(ahead=(point,))

    @staticmethod
    def _due(rows: Rows) -> bool:
        timed = [
            (row.purpose == Purpose.ANCHOR, row.duration_s or 0.0) for row in rows.values() if row.status == MEASURED
        ]
        anchors = [seconds for is_anchor, seconds in timed if is_anchor]
        others = sum(seconds for is_anchor, seconds in timed if not is_anchor)
        return bool(anchors) and sum(anchors) * (1 + 1 / len(anchors)) <= SHARE * others


def anchor_of(levels: Iterable[Point], load_s: float) -> Point | None:
    """Return the quickest of a session's levels as its anchor; None where a tenth of `load_s` holds too few of it."""
    quickest = min(levels, key=lambda point: point.estimate_s, default=None)
    return quickest if quickest is not None and FEWEST * quickest.estimate_s <= SHARE * load_s else None
