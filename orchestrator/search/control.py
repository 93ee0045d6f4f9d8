"""A control: the anchor's level again with no other session on its host, for what neighbours cost. Pure.

The anchor's readings beside other sessions are the control in company, so only those alone cost anything. When a
session is alone, the driver knows; it asks once all other points are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from contract.rows import MEASURED
from contract.specs import Point
from orchestrator.search import Rows
from orchestrator.search.anchors import FEWEST, READINGS, SHARE, affordable

ANCHORS_SHARE = SHARE / 2
"""Of the time of a session's load: what its anchors may take where a control is to follow."""


@dataclass(frozen=True, slots=True)
class Control:
    """See the module."""

    point_at: Callable[[int], Point]
    """The n-th reading alone, with its id."""

    def next(self, rows: Rows) -> Point | None:
        """Return the next reading to take alone; None where the figure needs no more, or their time is spent.

        Needs `FEWEST` readings in company; as many alone are enough. One that could not be measured is the last.
        """
        own = [row for row in rows.values() if row.purpose in READINGS]
        measured = [row for row in own if row.status == MEASURED]
        company = sum(bool(row.co_running_sessions) for row in measured)
        if company < FEWEST or len(measured) < len(own) or len(measured) - company >= company:
            return None
        if not affordable(rows, READINGS, SHARE):
            return None
        return next(point for n in itertools.count() if (point := self.point_at(n)).id not in rows)
