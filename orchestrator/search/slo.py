"""`+sweep=slo`: doublings until the objectives are missed, then halvings between what meets them and what misses. Pure.

What meets and misses is the rule of `analysis.load.checks`: that of the page which chooses among these levels.
"""

from __future__ import annotations

from collections.abc import Mapping

from analysis.load.checks import standings
from analysis.load.knee import RESOLUTION
from analysis.load.objectives import Border, border
from analysis.rows.targets import Slo
from orchestrator.search.bisection import Scale, outer_brackets
from orchestrator.search.rounds import Tried


def next_level(tried: Tried, slo: Slo, lowest: float, highest: float, scale: Scale) -> float | None:
    """Return the next level for the border of the objectives.

    Doublings from `lowest` go on until a level breaks or cannot be measured, up to `highest`. Then the bracket is
    halved: from the last that held up, and from the first that broke down, where undecided levels lie between them. So
    once levels have repeats, one that held in the first round and lies within noise of an objective is searched below.
    Where the first that broke turns out undecided, the border is near: one is looked for above it in steps that grow.
    A level that could not be measured bounds a bracket, too: the border may lie on either side of it. Between two such
    levels nothing is tried.
    """
    return towards_border(standings(tried, slo), tried, highest, scale) if tried else lowest


def towards_border(known: Mapping[float, bool | None], tried: Tried, highest: float, scale: Scale) -> float | None:
    """Return the same from what is known of the levels: True where one holds, None where it is undecided."""
    top = max(tried)
    found = border(known)
    if found.broke is None and top in known:
        following = min(_above(top, found, scale), highest)
        if following not in tried:
            return following
    if found.held is None:
        return None
    inside = [at for at in tried if at >= found.held and (found.broke is None or at <= found.broke)]
    sides = outer_brackets(inside, known)
    if found.broke is None and top in known:
        del sides[1:]
    middles = [scale.between(low, high) for low, high in sides]
    return next((middle for middle in middles if middle is not None), None)


def matter(tried: Tried, slo: Slo) -> frozenset[float]:
    """Return the levels whose further repeats can move the border."""
    return at_the_border(standings(tried, slo))


def at_the_border(known: Mapping[float, bool | None]) -> frozenset[float]:
    """Return the last level that held, the first that broke and those between."""
    found = border(known)
    return frozenset(at for at in (found.held, *found.undecided, found.broke) if at is not None)


def _above(top: float, found: Border, scale: Scale) -> float:
    """A doubling above a level that held; above an undecided one as far as undecided levels reach, a step at least."""
    if top not in found.undecided:
        return 2 * top
    return scale.within(top, min(max(top / found.undecided[0], RESOLUTION), 2))
