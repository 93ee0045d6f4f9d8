"""What the load levels say: where throughput stops scaling, where latency blows up, what concurrency buys. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.groups import LOAD
from analysis.series import Reading, Series, make_series
from analysis.statistics import overtake, plateau
from analysis.tables import RunPoint

PLATEAU_WITHIN = 0.05
"""Throughput has stopped scaling at the lowest level within this share of the highest tok/s (tutorial: 5 to 10 %)."""
P95_JUMP = 2.0
"""A level's p95 is called a jump from this factor over the previous level on."""
NEAR_TARGET = 0.9
"""An achieved concurrency below this share of the level is mentioned: ramp and drain, or a client that lags."""


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """The levels of one purpose on one server with one workload."""

    series: Series

    @property
    def name(self) -> str:
        """Prefix of the names of its figures."""
        return self.series.name

    @property
    def levels(self) -> tuple[Reading, ...]:
        """Levels with a measured tok/s and p95, ascending."""
        return tuple(
            r for r in self.series.measured if r.median("tok_s") is not None and r.median("p95_e2e_s") is not None
        )

    @property
    def best(self) -> Reading | None:
        """The level with the highest median tok/s."""
        return max(self.levels, key=lambda r: r.median("tok_s") or 0.0, default=None)

    @property
    def plateau(self) -> Reading | None:
        """The lowest level within `PLATEAU_WITHIN` of the best tok/s."""
        return self._level(plateau([(r.at, r.median("tok_s") or 0.0) for r in self.levels], PLATEAU_WITHIN))

    @property
    def still_rising(self) -> bool:
        """Whether the plateau is the last level, so that where throughput stops scaling was not seen."""
        return bool(self.levels) and self.plateau is self.levels[-1]

    @property
    def overtake(self) -> Reading | None:
        """The first level at which p95 grew by a larger factor than tok/s, and did not fall again."""
        return self._level(
            overtake([(r.at, r.median("tok_s") or 0.0, r.median("p95_e2e_s") or 0.0) for r in self.levels])
        )

    @property
    def before_overtake(self) -> Reading | None:
        """The last level before `overtake`; None when it was never reached or is the first comparison's base."""
        return next((a for a, b in pairwise(self.levels) if b is self.overtake), None)

    def previous(self, reading: Reading) -> Reading | None:
        """Return the next lower measured level."""
        return next((a for a, b in pairwise(self.levels) if b is reading), None)

    def ratio(self, reading: Reading, base: Reading, column: str) -> float | None:
        """Return the column's median at `reading` over that at `base`."""
        above, below = reading.median(column), base.median(column)
        return above / below if above is not None and below else None

    def _level(self, at: float | None) -> Reading | None:
        return next((r for r in self.levels if r.at == at), None)


def load_curves(points: Sequence[RunPoint], purpose: str) -> list[LoadCurve]:
    """Return one curve per server and workload for the points of a purpose."""
    rows = [point for point in points if point.purpose == purpose]
    return [LoadCurve(series) for series in make_series(rows, LOAD, "concurrency", purpose)]
