"""`+sweep=slo`: doublings until the objectives are missed, then halvings between what meets them and what misses. Pure.

What meets and misses is the rule of `analysis.load.checks`: that of the page which chooses among these levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

from analysis.load.checks import standings
from analysis.load.objectives import border
from analysis.rows.targets import Slo
from orchestrator.search.rounds import Tried

Between = Callable[[float, float], float | None]


def next_level(tried: Tried, slo: Slo, lowest: float, highest: float, between: Between) -> float | None:
    """Return the next level for the border of the objectives.

    Doublings from `lowest` go on until a level breaks, up to `highest`. Then the bracket is halved (`between`): from
    the last that held up, and from the first that broke down, where undecided levels lie between them. So once levels
    have repeats, one that held in the first round and lies within noise of an objective is searched below.
    """
    return towards_border(standings(tried, slo), tried, lowest, highest, between) if tried else lowest


def towards_border(
    known: Mapping[float, bool | None], tried: Tried, lowest: float, highest: float, between: Between
) -> float | None:
    """Return the same from what is known of the levels: True where one holds, None where it is undecided."""
    top = max(tried)
    found = border(known)
    if found.broke is None and top in known:
        following = min(2 * top, highest)
        if following not in tried:
            return following
    if found.held is None:
        return None
    pairs = list(pairwise([found.held, *found.undecided, *([] if found.broke is None else [found.broke])]))
    sides = pairs[:1] if found.broke is None else [pairs[0], pairs[-1]]
    middles = [between(low, high) for low, high in sides]
    return next((middle for middle in middles if middle is not None and middle not in tried), None)
