"""Samples of cards and servers in bins on the run's clock: hours of samples become what a page can hold.

A bin keeps the lowest, the mean and the highest of its samples, so that no peak is lost. Binning is Arrow's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from analysis.pages.timeline import bars_of, card_labels, cards_of
from analysis.rows.batches import Totals, Values, add_up, column_names, merged, read_batches, totals_of
from analysis.rows.tables import Tables, moment
from analysis.writing.figures import clean

BINS = 300
"""At most so many bins along the axis: about as many as a narrow screen has pixels."""
SHORTEST_BIN_S = 1.0
"""Servers are sampled twice a second: a shorter bin would hold nothing now and then."""
MOST_BANDS = 8
"""With more cards than that all of them become one band, which a page can hold and a reader can read."""

HOWS = ("min", "sum", "count", "max")
"""What is kept of a bin's samples."""

PointId: TypeAlias = tuple[str, str]
"""Session and point."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Samples between `start_s` and a bin's length later."""

    start_s: float
    low: float
    mean: float
    high: float


@dataclass(frozen=True, slots=True)
class Band:
    """One card's bins over time; a gap in the samples begins another segment."""

    label: str
    segments: tuple[tuple[Bin, ...], ...]


@dataclass(frozen=True, slots=True)
class Bands:
    """One quantity of all cards."""

    bin_s: float
    bands: tuple[Band, ...]
    together: int = 0
    """So many cards stand in one band; 0: each has its own."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and when a point was measured."""

    start_s: float
    """Since the first server was started."""
    node: str
    cards: str
    """Labels of the cards of its server."""


@dataclass(frozen=True, slots=True)
class Clock:
    """The run's time axis, and what stands on it."""

    origin: float
    """Since the epoch: the first server's start, or the first point's where no server has a start and an end."""
    places: Mapping[PointId, Place]
    labels: Mapping[tuple[str, str], str]
    """Of each card, by node and device id."""

    def card(self, node: str, device: str) -> str:
        """Return a card's label; its id where no session names it."""
        return self.labels.get((node, device)) or clean(device)


def clock_of(tables: Tables) -> Clock:
    """Return the time axis that all charts of a run share."""
    origin, bars = bars_of(tables)
    starts = {id(point): start for point in tables.points if (start := moment(point.started_at)) is not None}
    if not bars:
        origin = min(starts.values(), default=0.0)
    labels = card_labels(tables.sessions)
    cards = {
        (session.session_id, session.attempt): " + ".join(labels[card] for card in cards_of(session))
        for session in tables.sessions
    }
    places = {
        (point.session_id, point.point_id): Place(
            starts[id(point)] - origin,
            point.node or "",
            cards.get((point.session_id, point.attempt), clean(point.session_id)),
        )
        for point in tables.points
        if id(point) in starts
    }
    return Clock(origin, places, labels)


def telemetry(run_dir: Path, clock: Clock, columns: Sequence[str]) -> dict[str, Bands]:
    """Return the bands of each column of telemetry.parquet that holds anything, one band a card."""
    samples = Samples(run_dir / "telemetry.parquet", clock, ("device_id",))
    return _bands(samples, columns, lambda place, device: clock.card(place.node, device))


def server_samples(run_dir: Path, clock: Clock, columns: Sequence[str]) -> dict[str, Bands]:
    """Return the same of server_samples.parquet, one band for the cards that a server had."""
    return _bands(Samples(run_dir / "server_samples.parquet", clock, ()), columns, lambda place: place.cards)


@dataclass(frozen=True, slots=True)
class Samples:
    """A table of samples on the run's clock."""

    path: Path
    clock: Clock
    ids: tuple[str, ...]
    """Columns that tell samples of one point apart."""

    def having(self, columns: Sequence[str]) -> list[str]:
        """Return those of the columns that the table has."""
        there = column_names(self.path)
        return [column for column in columns if column in there]

    def batches(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the samples of points whose start is known: ids, columns, `place` (its number), `at` (on the clock)."""
        kinds = {name: pa.string() for name in ("session_id", "point_id", *self.ids)}
        schema = pa.schema([*kinds.items(), *((name, pa.float64()) for name in ("t_s", *columns))])
        numbers = {point: number for number, point in enumerate(self.clock.places)}
        starts = pa.array([place.start_s for place in self.clock.places.values()], pa.float64())
        for batch in read_batches(self.path, schema):
            places = _numbered(batch, numbers)
            at = pc.add(starts.take(places), batch["t_s"])
            placed = batch.append_column("place", places).append_column("at", at)
            if (known := placed.filter(pc.is_finite(at))).num_rows:
                yield known


def _numbered(batch: pa.Table, numbers: Mapping[PointId, int]) -> pa.ChunkedArray:
    """Return each row's point as its number; null for one without. A batch holds few points: each is looked up once."""
    session, point = (batch[name].combine_chunks().dictionary_encode() for name in ("session_id", "point_id"))
    pairs = [numbers.get((a, b)) for a in session.dictionary.to_pylist() for b in point.dictionary.to_pylist()]
    row = pc.multiply(pc.cast(session.indices, pa.int64()), len(point.dictionary))
    return pa.array(pairs, pa.int64()).take(pc.add(row, pc.cast(point.indices, pa.int64())))


def _bands(samples: Samples, columns: Sequence[str], label: Callable[..., str]) -> dict[str, Bands]:
    """Return the bands of each column that holds anything; `label` names one by its place and the samples' ids."""
    if not samples.path.is_file():
        return {}
    columns = samples.having(columns)
    ends = totals_of(samples.batches([]), [], [("at", "min"), ("at", "max")])
    if not ends:
        return {}
    ((first, last),) = ends.values()
    bin_s = max(SHORTEST_BIN_S, (last - first) / BINS)
    found: dict[str, Totals] = {column: {} for column in columns}
    for batch in samples.batches(columns):
        binned = batch.append_column("bin", pc.floor(pc.divide(batch["at"], bin_s)))
        for column, totals in found.items():
            seen = binned.filter(pc.is_finite(binned[column]))
            add_up(totals, seen, ["place", *samples.ids, "bin"], [(column, how) for how in HOWS])
    places = list(samples.clock.places.values())
    return {
        column: _of_a_column(
            ((label(places[place], *ids), bin_, v) for (place, *ids, bin_), v in totals.items()), bin_s
        )
        for column, totals in found.items()
        if totals
    }


def _of_a_column(binned: Iterable[tuple[str, float, Values]], bin_s: float) -> Bands:
    lines: dict[str, dict[float, Values]] = {}
    for who, number, values in binned:
        _merge(lines.setdefault(who, {}), number, values)
    together = len(lines) if len(lines) > MOST_BANDS else 0
    if together:
        every: dict[float, Values] = {}
        for line in lines.values():
            for number, values in line.items():
                _merge(every, number, values)
        lines = {"all cards": every}
    bands = tuple(Band(who, _segments(_bins(lines[who], bin_s))) for who in sorted(lines))
    return Bands(bin_s, bands, together)


def _merge(line: dict[float, Values], number: float, values: Values) -> None:
    line[number] = merged(line[number], values, HOWS) if number in line else values


def _bins(line: Mapping[float, Values], bin_s: float) -> list[tuple[float, Bin]]:
    return [(at, Bin(at * bin_s, low, total / n, high)) for at, (low, total, n, high) in line.items()]


def _segments(line: Iterable[tuple[float, Bin]]) -> tuple[tuple[Bin, ...], ...]:
    segments: list[list[Bin]] = []
    before = -math.inf
    for number, one in sorted(line, key=lambda pair: pair[0]):
        if number - before > 1:
            segments.append([])
        segments[-1].append(one)
        before = number
    return tuple(map(tuple, segments))


def vertices(band: Band, bin_s: float, unit: float = 1.0) -> list[dict[str, Any]]:
    """Return a band as corners of steps: every bin at its start, and the last of a segment at its end, too."""
    made = []
    for number, segment in enumerate(band.segments):
        ends = [*((one.start_s, one) for one in segment), (segment[-1].start_s + bin_s, segment[-1])]
        for at, one in ends:
            made.append(
                {"part": number, "at": at, "low": one.low / unit, "mean": one.mean / unit, "high": one.high / unit}
            )
    return made
