"""Do the searches find what a grid of the same resolution finds, and in how much of its load time?

    python benchmarks/search_vs_grid.py [--lowest 16] [--highest 256] [--p95-e2e-s 0.5] [--read RUN...] [OVERRIDE...]

Three runs in turn: `+sweep=knee`, `+sweep=slo` (closed loop) and `+sweep=concurrency` over every level of a log grid of
10 %, without controls, each with three repeats, searches of the levels at their border only (of `+sweep=knee` those in
the knee's range). OVERRIDEs are Hydra's, for all three. Prints what each found and the seconds of its measured windows,
as soon as it is there; the knee is read off by the rule of docs/definitions.md, as the set of levels that the noise
allows, and the border of the objective first by the rule of operating_point.md, the noise counted, and then repeat by
repeat. The runs stay where runs go; `--read` takes the three, in that order, instead of measuring.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.load.checks import standings
from analysis.load.knee import Level, find_knee
from analysis.load.objectives import border, states
from analysis.numbers.intervals import pooled_noise
from analysis.rows.tables import read_tables
from analysis.rows.targets import Slo
from contract.rows import MEASURED, PointRow
from contract.specs import PointKind

STEP = 1.1
REPEATS = 3


@dataclass(frozen=True)
class Found:
    """What one run measured."""

    rows: Sequence[PointRow]

    @classmethod
    def of(cls, run: Path) -> Found:
        """Read a run directory."""
        rows = read_tables(run).points
        return cls([row for row in rows if row.kind == PointKind.LOAD and row.status == MEASURED])

    def cost(self) -> str:
        """In words."""
        return f"{len(self.tried)} levels, {len(self.rows)} points, {self.load_s:.1f} s of load"

    @property
    def load_s(self) -> float:
        """Seconds of its measured windows."""
        return sum(row.duration_s or 0 for row in self.rows)

    @property
    def tried(self) -> dict[float, list[PointRow]]:
        """Rows by level."""
        levels: dict[float, list[PointRow]] = defaultdict(list)
        for row in self.rows:
            levels[row.concurrency or 0].append(row)
        return dict(sorted(levels.items()))

    def knee(self) -> str:
        """In words."""
        levels = tuple(
            Level(int(at), tuple(row.tok_s or 0 for row in rows), tuple(row.p95_e2e_s or 0 for row in rows))
            for at, rows in self.tried.items()
        )
        found = find_knee(levels, pooled_noise(level.tok_s for level in levels))
        return f"{found.verdict}: {', '.join(map(str, found.could_be)) or '-'}"

    def held(self, slo: Slo) -> str:
        """By both rules, in words."""
        counted, single = standings(self.tried, slo), states(self.tried, slo)
        return f"objective, noise counted: {_border_words(counted)}; repeat by repeat: {_border_words(single)}"


def _border_words(known: Mapping[float, bool | None]) -> str:
    found = border(known)
    return f"held at {found.held}, broke at {found.broke}, undecided {list(found.undecided)}"


def main() -> None:
    """Run and print."""
    options, overrides = _options()
    slo = Slo(p95_e2e_s=options.p95_e2e_s)
    levels = log_grid(options.lowest, options.highest)
    ends = [f"sweep.concurrency.lowest={options.lowest}", f"sweep.concurrency.highest={options.highest}"]
    common = [*overrides, f"slo.p95_e2e_s={options.p95_e2e_s}", f"sweep.repeats={REPEATS}", "controls=off"]
    asked = [
        ["+sweep=knee", *ends, *common],
        ["+sweep=slo", *ends, "sweep.request_rate=null", *common],
        ["+sweep=concurrency", f"sweep.concurrency=[{','.join(map(str, levels))}]", *common],
    ]
    found = []
    for number, words in enumerate(asked):
        run = options.read[number] if options.read else _run(words)
        found.append(Found.of(run))
        print(f"{words[0]} ({run}): knee {found[-1].knee()}; {found[-1].held(slo)}; {found[-1].cost()}", flush=True)
    for name, search in zip(("knee", "slo"), found, strict=False):
        print(f"{name}: load time over the grid's {search.load_s / found[-1].load_s:.3f}")


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowest", type=int, default=16)
    parser.add_argument("--highest", type=int, default=256)
    parser.add_argument("--p95-e2e-s", type=float, default=0.5)
    parser.add_argument("--read", type=Path, nargs=3, metavar="RUN", help="of knee, slo and the grid")
    return parser.parse_known_args()


def log_grid(lowest: int, highest: int) -> list[int]:
    """Return the whole numbers from `lowest` to `highest` in steps of about 10 %, at least 1."""
    levels = [lowest]
    while levels[-1] < highest:
        levels.append(min(max(levels[-1] + 1, round(levels[-1] * STEP)), highest))
    return levels


def _run(overrides: list[str]) -> Path:
    """Make a run; return its directory, which it names."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *overrides],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    named = re.search(r"results in (\S+)", done.stdout)
    if done.returncode or named is None:
        sys.exit(f"{' '.join(overrides)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    return Path(named[1])


if __name__ == "__main__":
    main()
