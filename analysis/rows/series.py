"""Points of one group along one axis (a length, a concurrency): at each place the repeats, and what failed there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.numbers.statistics import median, spread
from analysis.rows.groups import Group, grouped
from analysis.rows.tables import RunPoint
from analysis.writing.figures import Figure, plain, quote
from contract.rows import MEASURED


@dataclass(frozen=True, slots=True)
class Reading:
    """All repeats at one place of the axis."""

    name: str
    """Prefix of the names of its figures, `kv.SLUG.len4096`."""
    at: float
    measured: tuple[RunPoint, ...]
    unmeasured: tuple[RunPoint, ...]

    def values(self, column: str) -> list[float]:
        """Return the column's values over the measured repeats."""
        return [value for point in self.measured if (value := getattr(point, column)) is not None]

    def median(self, column: str) -> float | None:
        """Return the median over the measured repeats; None where the column is empty."""
        values = self.values(column)
        return median(values) if values else None

    def spread(self, column: str) -> float | None:
        """Return (highest - lowest) / median over the repeats; None for fewer than two."""
        return spread(self.values(column))

    def highest(self, column: str) -> float | None:
        """Return the largest value over the repeats: for what a median would hide (waiting, preemptions)."""
        return max(self.values(column), default=None)

    def figure(self, kind: Callable[[str, float | None], Figure], column: str) -> Figure:
        """Return the median as a figure named after the reading and the column."""
        return kind(f"{self.name}.{column}", self.median(column))


def reading_of(name: str, at: float, points: Sequence[RunPoint]) -> Reading:
    """Return the repeats of one place on an axis as a reading."""
    measured = tuple(point for point in points if point.status == MEASURED)
    return Reading(name, at, measured, tuple(point for point in points if point.status != MEASURED))


@dataclass(frozen=True, slots=True)
class Series:
    """Readings in the order of the axis."""

    name: str
    group: Group
    readings: tuple[Reading, ...]

    @property
    def measured(self) -> tuple[Reading, ...]:
        """The readings that hold at least one measured repeat."""
        return tuple(reading for reading in self.readings if reading.measured)

    @property
    def sample(self) -> RunPoint:
        """A point that stands for the group where only its configuration matters; a measured one if there is one."""
        return next((reading.measured[0] for reading in self.measured), self.group.points[0])


def concurrency_figure(reading: Reading) -> Figure:
    """Return the concurrency of a reading as a figure."""
    return plain(f"{reading.name}.concurrency", reading.at)


def outcome(point: RunPoint) -> str:
    """Return status and class of a point that was not measured, in one word or two."""
    if point.failure_class in (None, "", point.status):
        return point.status
    return f"{point.status}: {point.failure_class}"


def point_name(point: RunPoint) -> str:
    """Return the prefix of the names of a single point's figures."""
    return f"point.{point.session_id}.{point.point_id}"


def outcome_figure(point: RunPoint) -> Figure:
    """Return `outcome` as a figure: the words come from the row."""
    return quote(f"{point_name(point)}.outcome", outcome(point))


def make_series(points: Sequence[RunPoint], columns: Sequence[str], axis: str, prefix: str) -> list[Series]:
    """Return one series per group of `columns`, its readings along `axis`: a length, a concurrency or a rate."""
    short = {"max_model_len": "len", "concurrency": "c", "request_rate": "r"}[axis]
    result = []
    for group in grouped(points, columns):
        name = f"{prefix}.{group.slug}"
        places: dict[float, list[RunPoint]] = {}
        for point in group.points:
            places.setdefault(getattr(point, axis) or 0, []).append(point)
        readings = tuple(reading_of(f"{name}.{short}{at:.12g}", at, places[at]) for at in sorted(places))
        result.append(Series(name, group, readings))
    return result
