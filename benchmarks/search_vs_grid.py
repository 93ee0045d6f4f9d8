"""Do the searches find what a grid of the same resolution finds, and in how much of its load time?

    python benchmarks/search_vs_grid.py [--lowest 16] [--highest 256] [--p95-e2e-s 0.5] [OVERRIDE...]

Three runs in turn: `+sweep=knee`, `+sweep=slo` (closed loop) and `+sweep=concurrency` over every level of a
log grid of 10 %, each with three repeats and without controls. OVERRIDEs are Hydra's, for all three. Prints what each
found and the seconds of its measured windows; the knee is read off by the rule of docs/definitions.md, as the set of
levels that the noise allows, and the border of the objective by the rule of the search.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.intervals import pooled_noise
from analysis.knee import Level, find_knee
from analysis.objectives import border, states
from analysis.tables import read_tables
from analysis.targets import Slo
from contract.rows import MEASURED, PointRow
from contract.specs import PointKind

STEP = 1.1
REPEATS = 3


@dataclass(frozen=True)
class Found:
    """What one run measured."""

    rows: Sequence[PointRow]

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
        """In words."""
        found = border(states(self.tried, slo))
        return f"held at {found.held}, broke at {found.broke}, undecided {list(found.undecided)}"


def main() -> None:
    """Run and print."""
    options, overrides = _options()
    slo = Slo(p95_e2e_s=options.p95_e2e_s)
    levels = log_grid(options.lowest, options.highest)
    ends = [f"sweep.concurrency.lowest={options.lowest}", f"sweep.concurrency.highest={options.highest}"]
    common = [*overrides, f"slo.p95_e2e_s={options.p95_e2e_s}", f"sweep.repeats={REPEATS}", "controls=off"]
    with tempfile.TemporaryDirectory() as root:
        knee = _run(["+sweep=knee", *ends, *common], root)
        border_ = _run(["+sweep=slo", *ends, "sweep.request_rate=null", *common], root)
        grid = _run(["+sweep=concurrency", f"sweep.concurrency=[{','.join(map(str, levels))}]", *common], root)
    for name, search, said in (("knee", knee, Found.knee), ("slo", border_, lambda found: found.held(slo))):
        print(f"{name}: {said(search)} in {len(search.tried)} levels, {search.load_s:.1f} s of load")
        print(f"  grid: {said(grid)} in {len(grid.tried)} levels, {grid.load_s:.1f} s")
        print(f"  ratio of load time {search.load_s / grid.load_s:.3f}", flush=True)


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lowest", type=int, default=16)
    parser.add_argument("--highest", type=int, default=256)
    parser.add_argument("--p95-e2e-s", type=float, default=0.5)
    return parser.parse_known_args()


def log_grid(lowest: int, highest: int) -> list[int]:
    """Return the whole numbers from `lowest` to `highest` in steps of about 10 %, at least 1."""
    levels = [lowest]
    while levels[-1] < highest:
        levels.append(min(max(levels[-1] + 1, round(levels[-1] * STEP)), highest))
    return levels


def _run(overrides: list[str], root: str) -> Found:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *overrides, f"output_root={root}"],
        cwd=Path(__file__).parent.parent, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(overrides)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    directory = max(Path(root).iterdir(), key=lambda path: path.stat().st_mtime)
    rows = [row for row in read_tables(directory).points if row.kind == PointKind.LOAD and row.status == MEASURED]
    print(f"{' '.join(overrides[:1])}: {len(rows)} points", flush=True)
    return Found(rows)


if __name__ == "__main__":
    main()
