"""Searches: which points a session measures next, from the rows that it has so far. Pure; no server, no clock.

The planner makes them, the driver asks them after every row, and so does a resumed run:
the same rows give the same next points, whose ids are content hashes, so nothing is measured twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from contract.rows import PointRow
from contract.specs import Point

Rows: TypeAlias = Mapping[str, PointRow]
"""The rows of a session by point id, failed ones of this run among them: what was tried is not asked for again."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """A point that need not be measured, because what is known decides it."""

    point: Point
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """What a search wants next; with nothing in it, the search is done."""

    measure: tuple[Point, ...] = ()
    pruned: tuple[Pruned, ...] = ()
    ahead: tuple[Point, ...] = ()
    """To be measured before what is pending."""


class Search(Protocol):
    """A strategy over the points of one session."""

    @property
    def at_most(self) -> int:
        """Points that it may ask for, beyond those planned; 0 where only the engine can tell."""

    @property
    def estimate_s(self) -> float:
        """Roughly the seconds that they take."""

    def next(self, rows: Rows) -> Step:
        """Return what is next. It depends on `rows` alone, never on their order or on when they were measured."""


def next_step(searches: Iterable[Search], rows: Rows) -> Step:
    """Return the next steps of several searches as one, every point once."""
    steps = [search.next(rows) for search in searches]
    ahead = {point.id: point for step in steps for point in step.ahead if point.id not in rows}
    measure = {point.id: point for step in steps for point in step.measure if point.id not in rows}
    pruned = {each.point.id: each for step in steps for each in step.pruned if each.point.id not in rows}
    return Step(
        tuple(measure.values()),
        tuple(each for point_id, each in pruned.items() if point_id not in measure),
        tuple(ahead.values()),
    )
