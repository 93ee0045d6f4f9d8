"""`+sweep=slo` on synthetic servers whose border is known: where it ends, by either rule, and what that costs.

    python benchmarks/slo_truth.py [RUNS]

*Synthetic* servers are those of `knee_truth.py`. The objective is a p95 that they pass between two neighbouring numbers
of requests in flight, from 2 to 128; the search goes from 1 to 256 with three repeats. *Repeat by repeat*: a level
holds where all its repeats do, breaks where none does. *Noise counted*: the rule of operating_point.md as soon as
levels have repeats, which is what `+sweep=slo` does; *all thrice* is the same with all repeats of levels that are not
at the border, too. All see the same repeats of a level. What is recommended of the levels measured is the highest that
meets the objective by the rule of operating_point.md. Where p95 hardly grows up to the border no search finds it
through noise, so runs are also told apart by that. The *measured* server runs through the levels of one search on an
H200, with objectives that it passes from 4 to 24, searched from 2 to 32: a short grid, whose high levels are dear.

*Load* is the time that a search's levels take, requests over throughput, as a share of that of a grid of 10 % over the
same range with as many repeats. *Covered*: intervals of a level's p95 that hold the true one; 95 % are promised.
Which levels have two repeats hangs on what these say, so theirs are counted apart, and of them again those near the
objective.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analysis.load.checks import standings
from analysis.load.objectives import states
from analysis.numbers.intervals import noise_of, spread
from analysis.rows.targets import Slo
from benchmarks.knee_truth import ANSWER_TOKENS, make_curve
from benchmarks.search_vs_grid import log_grid
from contract.rows import MEASURED, SCHEMA_VERSION, PointRow
from contract.specs import Point, PointKind, Purpose
from orchestrator.search.bisection import WHOLE, doublings
from orchestrator.search.rounds import Rounds, Tried
from orchestrator.search.slo import at_the_border, towards_border

SEED = 20261128
REPEATS = 3
NOISES = (0.01, 0.02, 0.03, 0.05)
STEEP = 1.2
"""Growth of p95 in a doubling from which on a border can be found through such noise."""
FAR = 1.25
"""Two steps of the search, with room for whole numbers."""
NEAR = 0.15


@dataclass(frozen=True)
class Rule:
    """What a search goes by."""

    judge: Callable[[Tried, Slo], dict[float, bool | None]]
    all_thrice: bool = False
    """Whether every level has all repeats, and not only those at the border."""


BY_REPEATS, COUNTED = Rule(states), Rule(standings)
RULES = {"repeat by repeat": BY_REPEATS, "noise counted": COUNTED, "all thrice": Rule(standings, all_thrice=True)}


class Server(Protocol):
    """A server without noise, at any level."""

    def p95_s(self, level: int) -> float:
        """Return the p95 of its end-to-end latency."""

    def tok_s(self, level: int) -> float:
        """Return its throughput."""


@dataclass(frozen=True)
class Interpolated:
    """Through what was measured, straight lines on logarithmic scales; ends go on as they are."""

    levels: tuple[int, ...]
    p95s_s: tuple[float, ...]
    toks_s: tuple[float, ...]

    def p95_s(self, level: int) -> float:
        """See `Server`."""
        return self._at(level, self.p95s_s)

    def tok_s(self, level: int) -> float:
        """See `Server`."""
        return self._at(level, self.toks_s)

    def _at(self, level: int, values: tuple[float, ...]) -> float:
        above = min(max(bisect_left(self.levels, level), 1), len(self.levels) - 1)
        low, high = self.levels[above - 1 : above + 1]
        share = math.log(level / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(values[above - 1]) + share * math.log(values[above]))


MEASURED_SERVER = Interpolated(
    (2, 4, 8, 11, 13, 14, 15, 16, 19, 23, 32),
    (0.120, 0.187, 0.341, 0.425, 0.516, 0.550, 0.580, 0.600, 0.800, 1.03, 1.50),
    tuple(
        ANSWER_TOKENS * max(16, 4 * c) / s
        for c, s in ((2, 0.94), (4, 0.72), (8, 1.26), (11, 1.57), (13, 1.84), (14, 2.06), (15, 2.07), (16, 2.19),
                     (19, 2.56), (23, 3.08), (32, 4.20))
    ),
)  # fmt: skip
"""p95 and load time of the first repeats of a search that took half of its grid's load time, rounded: prompts of 2,000
tokens on an H200 (docs/measured_on_gpus.md)."""


@dataclass(frozen=True)
class Family:
    """Servers, and the range that is searched for a border of theirs."""

    lowest: int
    highest: int
    make: Callable[[random.Random], tuple[Server, int]]
    """Return a server, and the highest level that is to meet the objective."""


SYNTHETIC = Family(1, 256, lambda rng: (make_curve(rng)[0], int(2 ** rng.uniform(1, 7))))
MEASURED_ONCE = Family(2, 32, lambda rng: (MEASURED_SERVER, int(4 * 6 ** rng.random())))

ANY_POINT = Point("", PointKind.LOAD, Purpose.CONCURRENCY, "slo")
ANY_ROW = PointRow(
    SCHEMA_VERSION, "", "", "", "slo", PointKind.LOAD, Purpose.CONCURRENCY, 1, MEASURED, simulated=True, started_at=""
)


@dataclass(frozen=True)
class Seen:
    """The interval of a level's p95."""

    repeats: int
    near: bool
    """Whether the true p95 is within `NEAR` of the objective."""
    covers: bool
    """Whether it holds the true p95."""


@dataclass(frozen=True)
class Searched:
    """What a search measured of a server, and what is true of it."""

    true: int
    """The highest level that meets the objective."""
    growth: float
    """p95 there over p95 at half of it."""
    levels: int
    most_levels: int
    recommended: float
    """0: none."""
    load_share: float
    """Of the grid's load time."""
    intervals: tuple[Seen, ...]
    """Of every level whose noise is known."""


def searches(runs: int, sd: float, rule: Rule, family: Family = SYNTHETIC, seed: int = SEED) -> Iterator[Searched]:
    """Yield what a search by one rule finds on so many servers, the same for each rule."""
    rng = random.Random(seed)
    for number in range(runs):
        server, true = family.make(rng)
        slo = Slo(p95_e2e_s=math.sqrt(server.p95_s(true) * server.p95_s(true + 1)))
        levels, most_levels = search(server, slo, sd, rule, family, f"{seed} {number}")
        met = [int(level) for level, meets in standings(levels, slo).items() if meets]
        grid_s = REPEATS * sum(load_s(server, level) for level in log_grid(family.lowest, family.highest))
        own_s = sum(len(rows) * load_s(server, int(level)) for level, rows in levels.items())
        yield Searched(
            true,
            growth=server.p95_s(true) / server.p95_s(true // 2),
            levels=len(levels),
            most_levels=most_levels,
            recommended=max(met, default=0),
            load_share=own_s / grid_s,
            intervals=tuple(_intervals(server, levels, slo)),
        )


def search(server: Server, slo: Slo, sd: float, rule: Rule, family: Family, seed: str) -> tuple[Tried, int]:
    """Drive the search; return its levels, and how many it might have had."""

    def propose(tried: Tried) -> float | None:
        return towards_border(rule.judge(tried, slo), tried, family.highest, WHOLE) if tried else family.lowest

    def matter(tried: Tried) -> frozenset[float]:
        return frozenset(tried) if rule.all_thrice else at_the_border(rule.judge(tried, slo))

    rounds = Rounds(points_at, "concurrency", propose, doublings(family.lowest, family.highest), matter)
    return drive(rounds, lambda point: _row(server, point, sd, seed)), rounds.most_levels


def points_at(level: float) -> tuple[Point, ...]:
    """Return the repeats of a level."""
    return tuple(replace(ANY_POINT, id=f"{level:g}-{r}", concurrency=int(level), repeat=r) for r in range(REPEATS))


def drive(rounds: Rounds, measure: Callable[[Point], PointRow]) -> dict[float, list[PointRow]]:
    """Measure as the driver does; return the rows of each level, ascending.

    The search is asked after every row, and what it once asked for is measured, also where a later row made that
    needless.
    """
    rows: dict[str, PointRow] = {}
    pending: list[Point] = []
    while pending := [*pending, *(point for point in rounds.next(rows).measure if point not in pending)]:
        point = pending.pop(0)
        rows[point.id] = measure(point)
    tried: dict[float, list[PointRow]] = {}
    for row in sorted(rows.values(), key=lambda row: row.concurrency or 0):
        tried.setdefault(row.concurrency or 0, []).append(row)
    return tried


def _row(server: Server, point: Point, sd: float, seed: str) -> PointRow:
    """The same whichever rule asked for it, and when."""
    slower = math.exp(random.Random(f"{seed} {point.id}").gauss(0, sd))
    return replace(
        ANY_ROW,
        point_id=point.id,
        concurrency=point.concurrency,
        repeat=point.repeat,
        p95_e2e_s=server.p95_s(point.concurrency) * slower,
        tok_s=server.tok_s(point.concurrency) / slower,
    )


def load_s(server: Server, level: int) -> float:
    """Return how long one repeat of a level takes: requests over throughput."""
    return max(16, 4 * level) * ANSWER_TOKENS / server.tok_s(level)


def _intervals(server: Server, levels: Tried, slo: Slo) -> Iterator[Seen]:
    values = {int(at): [row.p95_e2e_s or 0 for row in rows] for at, rows in levels.items()}
    spreads = {at: spread(own) for at, own in values.items()}
    for at, own in values.items():
        noise, true = noise_of(spreads[at], list(spreads.values())), server.p95_s(at)
        if noise is not None and slo.p95_e2e_s is not None:
            interval = noise.interval(own)
            near = abs(true / slo.p95_e2e_s - 1) < NEAR
            yield Seen(len(own), near, interval.low <= true <= interval.high)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="?", type=int, default=500, help="%(default)s where left out")
    runs = parser.parse_args().runs
    for sd in NOISES:
        made = {rule: list(searches(runs, sd, RULES[rule])) for rule in RULES}
        for what, steep in (("grows by 20 % or more", True), ("grows by less", False)):
            for rule, found in made.items():
                some = [s for s in found if (s.growth >= STEEP) is steep]
                print(f"noise of {sd:.0%}, p95 {what} in the last doubling up to the border, {rule}: {summary(some)}")
        for rule in RULES:
            found = list(searches(runs, sd, RULES[rule], MEASURED_ONCE))
            print(f"noise of {sd:.0%}, the measured server, {rule}: {summary(found)}", flush=True)


def summary(made: list[Searched]) -> str:
    """In words."""
    levels, seen = [s.levels for s in made], [each for s in made for each in s.intervals]
    twice = [each for each in seen if each.repeats < REPEATS]
    factors = sorted(s.true / s.recommended for s in made if s.recommended)
    shares = sorted(s.load_share for s in made)
    return (
        f"{len(made)} runs, {sum(levels) / len(made):.2f} levels on average, {max(levels)} at most; "
        f"{sum(s.levels >= s.most_levels for s in made)} ended at the {made[0].most_levels} allowed; a level "
        f"recommended in {len(factors)}, too high in {sum(f < 1 for f in factors)}; the true one is above it by more "
        f"than {FAR - 1:.0%} in {sum(f > FAR for f in factors)}, by a factor of {sum(factors) / len(factors):.3f} on "
        f"average and {factors[len(factors) * 95 // 100]:.2f} at the 95th percentile; load "
        f"{sum(shares) / len(shares):.3f} of the grid's on average, {shares[-1]:.3f} at most, above a half in "
        f"{sum(share > 0.5 for share in shares)}; covered {_covered(seen)}, two "
        f"repeats {_covered(twice)}, near the objective {_covered([each for each in twice if each.near])}"
    )


def _covered(seen: list[Seen]) -> str:
    return f"{sum(each.covers for each in seen) / len(seen):.1%} of {len(seen)}" if seen else "none"


if __name__ == "__main__":
    main()
