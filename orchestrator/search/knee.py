"""`+sweep=knee`: doublings until throughput stops scaling, then halvings around the knee while noise allows. Pure.

What the knee is, when there is none, and what noise allows is the rule of `analysis.load.knee`.
"""

from __future__ import annotations

from itertools import takewhile

from analysis.load.knee import STILL_GAINS, WITHIN_PEAK, Level, find_knee, last_doubling, read_off
from analysis.numbers.intervals import pooled_noise
from contract.rows import MEASURED
from orchestrator.search.bisection import whole_between
from orchestrator.search.rounds import Tried


def next_level(tried: Tried, lowest: int, highest: int, repeats: int) -> int | None:
    """Return the next level for the knee; `repeats`: how many every level will have.

    Doublings from `lowest` go on while the last one gained more than `WITHIN_PEAK` of tok/s, up to `highest`. Then the
    bracket between the knee and the next lower level is halved, as long as noise leaves one level as the knee: nearer
    levels than it tells apart would be measured in vain. So halving waits for the second round. With one repeat there
    is no noise to know, and the knee is read off. Nothing is halved where there is no knee.
    """
    if not tried:
        return lowest
    levels = _measured(tried)
    if not levels:
        return None
    doubling, top = last_doubling(levels, None), int(levels[-1].at)
    climbing = doubling is None or doubling.share > WITHIN_PEAK
    if climbing and top == max(tried) and top < highest:
        return min(2 * top, highest)
    if doubling is None or doubling.share > STILL_GAINS:
        return None
    knee = read_off(levels) if repeats == 1 else _one_left(levels)
    if knee is None:
        return None
    below = [level.at for level in takewhile(lambda level: level.at < knee, levels)]
    middle = whole_between(below[-1], knee) if below else None
    return None if middle in tried else middle


def _one_left(levels: tuple[Level, ...]) -> float | None:
    """The knee where noise leaves one level; None where it leaves several, or is not known yet."""
    could_be = find_knee(levels, pooled_noise(level.tok_s for level in levels)).could_be
    return could_be[0] if len(could_be) == 1 else None


def _measured(tried: Tried) -> tuple[Level, ...]:
    levels = []
    for at, rows in tried.items():
        pairs = [(row.tok_s, row.p95_e2e_s) for row in rows if row.status == MEASURED and row.tok_s and row.p95_e2e_s]
        if pairs:
            levels.append(Level(int(at), tuple(tok_s for tok_s, _ in pairs), tuple(p95 for _, p95 in pairs)))
    return tuple(levels)
