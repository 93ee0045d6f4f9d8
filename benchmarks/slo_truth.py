"""`+sweep=slo` on synthetic servers whose border is known: where it ends, by either rule, and in how many levels.

    python benchmarks/slo_truth.py [RUNS]

Servers are those of `knee_truth.py`. The objective is a p95 that they pass between two neighbouring numbers of requests
in flight, from 2 to 128; the search goes from 1 to 256 with three repeats. *Repeat by repeat*: a level holds where all
its repeats do, breaks where none does. *Noise counted*: the rule of operating_point.md as soon as levels have repeats,
which is what `+sweep=slo` does. Either rule sees the same repeats of a level. What is recommended of the levels it
measured is the highest that meets the objective by the rule of operating_point.md. Where p95 hardly grows up to the
border no search finds it through noise, so runs are also told apart by that.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from analysis.load.checks import standings
from analysis.load.objectives import states
from analysis.rows.targets import Slo
from benchmarks.knee_truth import ANSWER_TOKENS, Curve, make_curve
from contract.rows import MEASURED, SCHEMA_VERSION, PointRow
from contract.specs import Point, PointKind, Purpose
from orchestrator.search.bisection import doublings, whole_between
from orchestrator.search.rounds import Rounds, Tried
from orchestrator.search.slo import towards_border

SEED = 20261128
LOWEST, HIGHEST, REPEATS = 1, 256, 3
NOISES = (0.01, 0.02, 0.03, 0.05)
STEEP = 1.2
"""Growth of p95 in a doubling from which on a border can be found through such noise."""
FAR = 1.25
"""Two steps of the search, with room for whole numbers."""
Judge = Callable[[Tried, Slo], dict[float, bool | None]]
RULES: dict[str, Judge] = {"repeat by repeat": states, "noise counted": standings}

ANY_POINT = Point("", PointKind.LOAD, Purpose.CONCURRENCY, "slo")
ANY_ROW = PointRow(
    SCHEMA_VERSION, "", "", "", "slo", PointKind.LOAD, Purpose.CONCURRENCY, 1, MEASURED, simulated=True, started_at=""
)


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


def searches(runs: int, sd: float, judge: Judge, seed: int = SEED) -> Iterator[Searched]:
    """Yield what a search by one rule finds on so many servers, the same for either rule."""
    rng = random.Random(seed)
    for number in range(runs):
        (curve, _), true = make_curve(rng), int(2 ** rng.uniform(1, 7))
        slo = Slo(p95_e2e_s=math.sqrt(curve.p95_s(true) * curve.p95_s(true + 1)))
        levels, most_levels = search(curve, slo, sd, judge, f"{seed} {number}")
        met = [int(level) for level, meets in standings(levels, slo).items() if meets]
        growth = curve.p95_s(true) / curve.p95_s(true // 2)
        yield Searched(true, growth, len(levels), most_levels, max(met, default=0))


def search(curve: Curve, slo: Slo, sd: float, judge: Judge, seed: str) -> tuple[Tried, int]:
    """Drive the search as the driver does, asked after every row; return its levels, and how many it might have had."""

    def points_at(level: float) -> tuple[Point, ...]:
        return tuple(replace(ANY_POINT, id=f"{level:g}-{r}", concurrency=int(level), repeat=r) for r in range(REPEATS))

    def propose(tried: Tried) -> float | None:
        return towards_border(judge(tried, slo), tried, LOWEST, HIGHEST, whole_between) if tried else LOWEST

    rounds = Rounds(points_at, "concurrency", propose, doublings(LOWEST, HIGHEST))
    rows: dict[str, PointRow] = {}
    while (step := rounds.next(rows)).measure:
        rows[step.measure[0].id] = _row(curve, step.measure[0], sd, seed)
    tried: dict[float, list[PointRow]] = {}
    for row in sorted(rows.values(), key=lambda row: row.concurrency or 0):
        tried.setdefault(row.concurrency or 0, []).append(row)
    return tried, rounds.most_levels


def _row(curve: Curve, point: Point, sd: float, seed: str) -> PointRow:
    """The same whichever rule asked for it, and when."""
    p95_s = curve.p95_s(point.concurrency) * math.exp(random.Random(f"{seed} {point.id}").gauss(0, sd))
    tok_s = point.concurrency * ANSWER_TOKENS / p95_s
    return replace(
        ANY_ROW, point_id=point.id, concurrency=point.concurrency, repeat=point.repeat, p95_e2e_s=p95_s, tok_s=tok_s
    )


def main() -> None:
    """Run and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    for sd in NOISES:
        made = {rule: list(searches(runs, sd, judge)) for rule, judge in RULES.items()}
        for what, steep in (("grows by 20 % or more", True), ("grows by less", False)):
            for rule, found in made.items():
                some = [s for s in found if (s.growth >= STEEP) is steep]
                print(f"noise of {sd:.0%}, p95 {what} in the last doubling up to the border, {rule}: {summary(some)}")
        pairs = list(zip(*made.values(), strict=True))
        higher = sum(counted.recommended > single.recommended for single, counted in pairs)
        lower = sum(counted.recommended < single.recommended for single, counted in pairs)
        print(f"  noise counted recommends a higher level in {higher}, a lower one in {lower}", flush=True)


def summary(made: list[Searched]) -> str:
    """In words."""
    levels = [s.levels for s in made]
    factors = sorted(s.true / s.recommended for s in made if s.recommended)
    return (
        f"{len(made)} runs, {sum(levels) / len(made):.2f} levels on average, {max(levels)} at most; "
        f"{sum(s.levels >= s.most_levels for s in made)} ended at the {made[0].most_levels} allowed; a level "
        f"recommended in {len(factors)}, too high in {sum(f < 1 for f in factors)}; the true one is above it by more "
        f"than {FAR - 1:.0%} in {sum(f > FAR for f in factors)}, by a factor of "
        f"{factors[len(factors) * 95 // 100]:.2f} at the 95th percentile"
    )


if __name__ == "__main__":
    main()
