"""`+sweep=slo`: doublings until the objectives are missed, then halvings between what held and what broke. Pure.

What holds is the rule of `analysis.load.objectives`.
"""

from __future__ import annotations

from collections.abc import Callable

from analysis.load.objectives import border, states
from analysis.rows.targets import Slo
from orchestrator.search.rounds import Tried

Between = Callable[[float, float], float | None]


def next_level(tried: Tried, slo: Slo, lowest: float, highest: float, between: Between) -> float | None:
    """Return the next level for the border of the objectives.

    Doublings from `lowest` go on until a level breaks, up to `highest`. Then the bracket is halved (`between`): from
    the last that held up, and from the first that broke down, where levels whose repeats disagree lie between them.
    """
    if not tried:
        return lowest
    known = states(tried, slo)
    top = max(tried)
    found = border(known)
    if found.broke is None:
        following = min(2 * top, highest)
        return None if top not in known or following in tried else following
    if found.held is None:
        return None
    edges = [found.held, *found.undecided, found.broke]
    middles = [between(low, high) for low, high in ((edges[0], edges[1]), (edges[-2], edges[-1]))]
    return next((middle for middle in middles if middle is not None and middle not in tried), None)
