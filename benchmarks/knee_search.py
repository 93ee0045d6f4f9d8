"""`+sweep=knee` on servers whose knee is known: in which range it finds that, and what that costs.

    python benchmarks/knee_search.py [RUNS]

*Synthetic* servers are those of `knee_truth.py`, each searched from 1 to its last doubling with three repeats; the
*measured* one is that of `slo_truth.py`, searched from 2 to 32. Truths are the rule of docs/definitions.md without
noise: the set is held against the knee of the levels that were measured, the *range* (from the level below the set,
that one excluded, to the set's highest) against that of all whole numbers up to the highest level measured,
once by the highest tok/s of the levels measured and once by that of all numbers, for a peak can lie between levels.
*Load* is the time that the levels take, requests over throughput, as a share of that of a grid of 10 % up to the
highest of them with as many repeats.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.load.knee import Knee, Level, find_knee, last_doubling
from analysis.numbers.intervals import pooled_noise
from benchmarks.knee_truth import SEED, STILL_GAINS, WITHIN_PEAK, make_curve
from benchmarks.search_vs_grid import log_grid
from benchmarks.slo_truth import MEASURED_SERVER, REPEATS, Server, drive, load_s, points_at
from contract.rows import MEASURED, PointRow
from contract.specs import Point
from orchestrator.search.bisection import doublings
from orchestrator.search.knee import matter, next_level
from orchestrator.search.rounds import Rounds

NOISES = (0.01, 0.02, 0.03, 0.04)


@dataclass(frozen=True)
class Family:
    """Servers, and the range that is searched for a knee of theirs."""

    lowest: int
    make: Callable[[random.Random], tuple[Server, int]]
    """Return a server, and the highest level that may be asked for."""


def _synthetic(rng: random.Random) -> tuple[Server, int]:
    curve, count = make_curve(rng)
    return curve, 2 ** (count - 1)


SYNTHETIC = Family(1, _synthetic)
MEASURED_ONCE = Family(2, lambda rng: (MEASURED_SERVER, 32))


@dataclass(frozen=True)
class Searched:
    """What `+sweep=knee` measured of a server, and what analysis says of it."""

    server: Server
    lowest: int
    levels: tuple[Level, ...]
    most_levels: int
    knee: Knee

    @property
    def truth(self) -> int | None:
        """The knee by the rule, without noise, of the levels that were measured; None where there is none yet."""
        true = {int(level.at): self.server.tok_s(int(level.at)) for level in self.levels}
        gain = last_doubling(tuple(Level(at, (value,), (1.0,)) for at, value in true.items()), None)
        if gain is None or gain.share > STILL_GAINS:
            return None
        return next(at for at, value in true.items() if value >= (1 - WITHIN_PEAK) * max(true.values()))

    def range_holds(self, of_all: bool) -> bool:
        """Whether the knee of all whole numbers lies above the level below the set and up to its highest: within the
        band of the highest tok/s of the levels measured, or `of_all` numbers."""
        every = {at: self.server.tok_s(at) for at in range(self.lowest, int(self.levels[-1].at) + 1)}
        highest = max(every.values()) if of_all else max(every[int(level.at)] for level in self.levels)
        knee = next(at for at, value in every.items() if value >= (1 - WITHIN_PEAK) * highest)
        return (self.knee.above or 0) < knee <= self.knee.could_be[-1]

    @property
    def span(self) -> float:
        """The highest level of the set over the level below it; over its lowest where there is none below."""
        return self.knee.could_be[-1] / (self.knee.above or self.knee.could_be[0])

    @property
    def load_share(self) -> float:
        """Of the grid's load time."""
        grid = log_grid(self.lowest, int(self.levels[-1].at))
        own = sum(level.repeats * load_s(self.server, int(level.at)) for level in self.levels)
        return own / (REPEATS * sum(load_s(self.server, at) for at in grid))


def searches(runs: int, sd: float, family: Family = SYNTHETIC, seed: int = SEED) -> Iterator[Searched]:
    """Yield what the search finds of so many servers."""
    rng = random.Random(seed)
    for number in range(runs):
        server, highest = family.make(rng)
        levels, most_levels = search(server, family.lowest, highest, sd, f"{seed} {number}")
        knee = find_knee(levels, pooled_noise([level.tok_s for level in levels]))
        yield Searched(server, family.lowest, levels, most_levels, knee)


def search(server: Server, lowest: int, highest: int, sd: float, seed: str) -> tuple[tuple[Level, ...], int]:
    """Drive the search; return its levels, and how many it might have had."""
    propose = partial(next_level, lowest=lowest, highest=highest, repeats=REPEATS)
    rounds = Rounds(points_at, "concurrency", propose, doublings(lowest, highest), matter)
    tried = drive(rounds, lambda point: _row(server, point, sd, seed))
    levels = tuple(
        Level(at, tuple(r.tok_s or 0 for r in some), tuple(r.p95_e2e_s or 0 for r in some))
        for at, some in tried.items()
    )
    return levels, rounds.most_levels


def _row(server: Server, point: Point, sd: float, seed: str) -> PointRow:
    """The same whenever it is asked for."""
    dice, level = random.Random(f"{seed} {point.id}"), point.concurrency
    tok_s, p95_s = (of(level) * math.exp(dice.gauss(0, sd)) for of in (server.tok_s, server.p95_s))
    return cast(PointRow, SimpleNamespace(concurrency=level, status=MEASURED, tok_s=tok_s, p95_e2e_s=p95_s))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=int, default=500, help="%(default)s where left out")
    runs = parser.parse_args().runs
    for what, family in (("synthetic", SYNTHETIC), ("the measured server", MEASURED_ONCE)):
        for sd in NOISES:
            print(f"{what}, noise of {sd:.0%}: {summary(list(searches(runs, sd, family)))}", flush=True)


def summary(made: list[Searched]) -> str:
    """In words."""
    true, without = [s for s in made if s.truth is not None], [s for s in made if s.truth is None]
    found = [s for s in true if s.knee.could_be]
    sizes, levels = [len(s.knee.could_be) for s in found], [len(s.levels) for s in found]
    full = sum(len(s.levels) >= s.most_levels for s in found)
    spans, loads = sorted(s.span for s in found), sorted(s.load_share for s in found)
    return (
        f"{len(made)} runs, {fmean(len(s.levels) for s in made):.1f} levels each, "
        f"{fmean(s.load_share for s in made):.3f} of the grid's load; knee: {len(true)} runs, {len(found)} of them "
        f"found, with {fmean(levels):.1f} levels, {full} with all allowed; "
        f"the set holds the truth in {fmean(s.truth in s.knee.could_be for s in found):.1%} and one or two levels in "
        f"{fmean(size <= 2 for size in sizes):.1%}, {max(sizes)} at most; the range holds the knee of all numbers in "
        f"{fmean(s.range_holds(of_all=False) for s in found):.1%} by the highest tok/s measured, in "
        f"{fmean(s.range_holds(of_all=True) for s in found):.1%} by the highest of all numbers, and is a factor of "
        f"{math.exp(fmean(map(math.log, spans))):.2f} on average, {spans[len(spans) * 9 // 10]:.2f} at the 90th "
        f"percentile; load {fmean(loads):.3f} of the grid's on average, {loads[-1]:.3f} at most, above a half in "
        f"{sum(load > 0.5 for load in loads)}; no knee: {len(without)} runs, given a number: "
        f"{sum(bool(s.knee.could_be) for s in without)}"
    )


if __name__ == "__main__":
    main()
