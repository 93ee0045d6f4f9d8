"""`+sweep=knee`: doublings until throughput stops scaling, then halvings on both sides of what noise leaves. Pure.

What the knee is, when there is none, and what noise allows is the rule of `analysis.load.knee`.
"""

from __future__ import annotations

from analysis.load.knee import RESOLUTION, STILL_GAINS, WITHIN_PEAK, Knee, Level, find_knee, last_doubling, read_off
from analysis.numbers.intervals import pooled_noise
from contract.rows import MEASURED
from orchestrator.search.bisection import outer_brackets, whole_between
from orchestrator.search.rounds import Tried


def next_level(tried: Tried, lowest: int, highest: int, repeats: int) -> int | None:
    """Return the next level for the knee; `repeats`: how many every level will have.

    Doublings from `lowest` go on while the last one gained more than `WITHIN_PEAK` of tok/s, up to `highest` or, in
    halvings, to a level that could not be measured. Nothing more is tried where there is no knee. Else the range in
    which the knee lies is narrowed from both of its ends. An end is halved while it is wider than what lies between
    both, which noise does not tell apart: nearer levels would hardly make the range shorter. So halving waits for the
    second round. With one repeat there is no noise to know, and the knee is read off.
    """
    if not tried:
        return lowest
    levels = _measured(tried)
    if not levels:
        return None
    doubling, top = last_doubling(levels, None), int(levels[-1].at)
    if doubling is None or doubling.share > WITHIN_PEAK:
        lost = next((at for at in tried if at > top), None)
        higher = min(2 * top, highest) if lost is None else whole_between(top, lost)
        if higher is not None and higher > top:
            return higher
    if doubling is None or doubling.share > STILL_GAINS:
        return None
    could_be = _knee(levels).could_be if repeats > 1 else _as_it_stands(levels)
    inside = _range(tried, levels, could_be)
    if len(inside) < 2:
        return None
    alike = max(inside[-2] / could_be[0], RESOLUTION)
    measured = {level.at for level in levels}
    sides = outer_brackets(inside, measured) if inside[0] < could_be[0] else [(inside[-2], inside[-1])]
    middles = [whole_between(low, high) for low, high in sides if high > alike * low]
    return next((middle for middle in middles if middle is not None), None)


def matter(tried: Tried) -> frozenset[float]:
    """Return the levels whose further repeats can narrow the knee's range: all in it; all, where there is no knee."""
    levels = _measured(tried)
    could_be = _knee(levels).could_be if levels else ()
    return frozenset(_range(tried, levels, could_be) if could_be else tried)


def _range(tried: Tried, levels: tuple[Level, ...], could_be: tuple[float, ...]) -> list[float]:
    """The levels tried from the last one below the knee for sure, if there is one, to the highest that could be it."""
    if not could_be:
        return []
    first = max((level.at for level in levels if level.at < could_be[0]), default=could_be[0])
    return [at for at in tried if first <= at <= could_be[-1]]


def _knee(levels: tuple[Level, ...]) -> Knee:
    return find_knee(levels, pooled_noise(level.tok_s for level in levels))


def _as_it_stands(levels: tuple[Level, ...]) -> tuple[float, ...]:
    at = read_off(levels)
    return () if at is None else (at,)


def _measured(tried: Tried) -> tuple[Level, ...]:
    levels = []
    for at, rows in tried.items():
        pairs = [(row.tok_s, row.p95_e2e_s) for row in rows if row.status == MEASURED and row.tok_s and row.p95_e2e_s]
        if pairs:
            levels.append(Level(int(at), tuple(tok_s for tok_s, _ in pairs), tuple(p95 for _, p95 in pairs)))
    return tuple(levels)
