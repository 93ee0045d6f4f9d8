"""Which levels hold the service level objectives, repeat by repeat, and the border that draws along an axis. Pure.

Used by the pages of load, and by the search for the border (`orchestrator.search.slo`) while levels have one repeat;
with noise to count both go by `analysis.load.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from analysis.rows.targets import Slo
from contract.failures import FailureClass
from contract.rows import MEASURED, PointRow


@dataclass(frozen=True, slots=True)
class Border:
    """Levels on both sides of the objectives' border; None where no level is on that side."""

    held: float | None
    """The highest level that held below the first that broke."""
    undecided: tuple[float, ...]
    """Ascending: levels between both that do neither."""
    broke: float | None
    """The lowest level that broke."""


def holds(row: PointRow, slo: Slo) -> bool | None:
    """Return whether a repeat holds every objective; None where it was not measured.

    A p95 equal to its objective holds it; an answer of one token has no TPOT to miss. In an open loop the server must
    keep up, too: a window can end before its queue shows in p95. A level that failed because too many of its requests
    did does not hold.
    """
    if row.failure_class == FailureClass.LOAD_ERROR_RATE:
        return False
    if row.status != MEASURED:
        return None
    limits = [(getattr(slo, objective.name), getattr(row, objective.name)) for objective in fields(Slo)]
    met = all(limit is None or value is None or value <= limit for limit, value in limits)
    return met and row.keeps_up is not False


def states(levels: Mapping[float, Sequence[PointRow]], slo: Slo) -> dict[float, bool | None]:
    """Return for each level with a measured repeat whether all repeats hold (True), all break (False), or neither."""
    judged = {at: {holds(row, slo) for row in rows} - {None} for at, rows in levels.items()}
    return {at: next(iter(found)) if len(found) == 1 else None for at, found in judged.items() if found}


def border(known: Mapping[float, bool | None]) -> Border:
    """Return the border that the levels' states draw."""
    broke = min((at for at, state in known.items() if state is False), default=None)
    below = [at for at in known if broke is None or at < broke]
    held = max((at for at in below if known[at]), default=None)
    undecided = tuple(sorted(at for at in below if known[at] is None and (held is None or at > held)))
    return Border(held, undecided, broke)
