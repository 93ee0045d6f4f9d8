"""An anchor: one level that is measured again and again while a session lives, so that its drift shows. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from statistics import fmean

from contract.rows import MEASURED, PointRow
from contract.specs import Point, Purpose
from orchestrator.search import Rows, Step

SHARE = 0.1
"""Of the time that a session's load takes: what its anchors and its control may take together."""
READINGS = (Purpose.ANCHOR, Purpose.CONTROL)
FEWEST = 2
"""With fewer there is nothing to compare."""


@dataclass(frozen=True, slots=True)
class Anchors:
    """The first comes before all other load; each further one once the others' time since the last pays for it.

    So a long level is followed by one reading, not by as many as it would pay for: they would tell the same.
    """

    point_at: Callable[[int], Point]
    """The n-th reading of the anchor, with its id."""
    share: float = SHARE
    """Of the others' time: what it may take."""

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

    def _due(self, rows: Rows) -> bool:
        timed = [(row.purpose, row.duration_s or 0.0) for row in _measured(rows)]
        own = [seconds for purpose, seconds in timed if purpose == Purpose.ANCHOR]
        since = sum(seconds for _, seconds in itertools.takewhile(lambda t: t[0] != Purpose.ANCHOR, reversed(timed)))
        return affordable(rows, (Purpose.ANCHOR,), self.share) and fmean(own) <= self.share * since


def affordable(rows: Rows, purposes: Collection[str], share: float) -> bool:
    """Return whether one more reading keeps those of `purposes` within `share` of the time of all other load.

    It is taken to last as long as their mean; before the first there is none, and so no.
    """
    timed = [(row.purpose, row.duration_s or 0.0) for row in _measured(rows)]
    own = [seconds for purpose, seconds in timed if purpose in purposes]
    others = sum(seconds for purpose, seconds in timed if purpose not in READINGS)
    return bool(own) and sum(own) * (1 + 1 / len(own)) <= share * others


def _measured(rows: Rows) -> list[PointRow]:
    """In the order of their measurement, which that of a resumed run's rows is not."""
    return sorted((row for row in rows.values() if row.status == MEASURED), key=lambda row: row.started_at)


def anchor_of(levels: Iterable[Point], load_s: float, share: float = SHARE) -> Point | None:
    """Return the quickest of a session's levels as its anchor; None where `share` of `load_s` holds too few of it."""
    quickest = min(levels, key=lambda point: point.estimate_s, default=None)
    return quickest if quickest is not None and FEWEST * quickest.estimate_s <= share * load_s else None
