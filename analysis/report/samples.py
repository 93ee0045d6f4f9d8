"""Samples of cards and servers in bins on the run's clock: hours of samples become what a page can hold.

A bin keeps the lowest, the mean and the highest of its samples, so that no peak is lost. Binning is Arrow's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.errors import AnalysisError, first_line
from analysis.figures import clean
from analysis.tables import Tables
from analysis.timeline import bars_of, card_labels, cards_of, moment

BINS = 300
"""At most so many bins along the axis: about as many as a narrow screen has pixels."""
SHORTEST_BIN_S = 1.0
"""Servers are sampled twice a second: a shorter bin would hold nothing now and then."""
MOST_BANDS = 8
"""With more cards than that all of them become one band, which a page can hold and a reader can read."""

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
    cards = {session.session_id: " + ".join(labels[card] for card in cards_of(session)) for session in tables.sessions}
    places = {
        (point.session_id, point.point_id): Place(
            starts[id(point)] - origin, point.node or "", cards.get(point.session_id, clean(point.session_id))
        )
        for point in tables.points
        if id(point) in starts
    }
    return Clock(origin, places, labels)


def telemetry(run_dir: Path, clock: Clock, columns: Sequence[str]) -> dict[str, Bands]:
    """Return the bands of each column of telemetry.parquet that holds anything, one band a card."""
    samples = _on_the_clock(run_dir / "telemetry.parquet", clock, ("device_id",), columns)
    return _bands(samples, columns, ("node", "device_id"), clock.card)


def server_samples(run_dir: Path, clock: Clock, columns: Sequence[str]) -> dict[str, Bands]:
    """Return the same of server_samples.parquet, one band for the cards that a server had."""
    samples = _on_the_clock(run_dir / "server_samples.parquet", clock, (), columns)
    return _bands(samples, columns, ("cards",), lambda cards: cards)


def _on_the_clock(path: Path, clock: Clock, ids: Sequence[str], columns: Sequence[str]) -> pa.Table | None:
    """Return the samples of points whose start is known, with `at` in seconds on the clock; None without any."""
    if not path.is_file() or not clock.places:
        return None
    kinds = {name: pa.string() for name in ("session_id", "point_id", *ids)}
    try:
        there = set(pq.read_schema(path).names)
        values = ("t_s", *(column for column in columns if column in there))
        schema = pa.schema([*kinds.items(), *((name, pa.float64()) for name in values)])
        table = pq.read_table(path, columns=schema.names).select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise AnalysisError(f"{path}: not a table of samples ({clean(first_line(error))})") from error
    known = list(clock.places)
    which = pc.index_in(
        pc.binary_join_element_wise(table["session_id"], table["point_id"], "/"),
        value_set=pa.array([f"{session}/{point}" for session, point in known], pa.string()),
    )
    places = [clock.places[point] for point in known]
    starts = pa.array([place.start_s for place in places], pa.float64()).take(which)
    table = table.append_column("at", pc.add(starts, table["t_s"]))
    for name in ("node", "cards"):
        table = table.append_column(name, pa.array([getattr(place, name) for place in places], pa.string()).take(which))
    table = table.filter(pc.is_finite(table["at"]))
    return table if table.num_rows else None


def _bands(
    samples: pa.Table | None, columns: Sequence[str], keys: Sequence[str], label: Callable[..., str]
) -> dict[str, Bands]:
    if samples is None:
        return {}
    ends = pc.min_max(samples["at"]).as_py()
    bin_s = max(SHORTEST_BIN_S, (ends["max"] - ends["min"]) / BINS)
    samples = samples.append_column("bin", pc.floor(pc.divide(samples["at"], bin_s)))
    found = {}
    for column in (name for name in columns if name in samples.column_names):
        seen = samples.filter(pc.is_finite(samples[column]))
        if seen.num_rows:
            found[column] = _of_a_column(seen, column, keys, label, bin_s)
    return found


def _of_a_column(seen: pa.Table, column: str, keys: Sequence[str], label: Callable[..., str], bin_s: float) -> Bands:
    whose = seen.group_by([*keys]).aggregate([]).num_rows
    together = whose if whose > MOST_BANDS else 0
    by = [] if together else list(keys)
    binned = seen.group_by([*by, "bin"]).aggregate([(column, "min"), (column, "mean"), (column, "max")])
    lines: dict[str, list[tuple[float, Bin]]] = {}
    for row in binned.to_pylist():
        who = "all cards" if together else label(*(row[key] for key in by))
        values = (row[f"{column}_{what}"] for what in ("min", "mean", "max"))
        lines.setdefault(who, []).append((row["bin"], Bin(row["bin"] * bin_s, *values)))
    return Bands(bin_s, tuple(Band(who, _segments(lines[who])) for who in sorted(lines)), together)


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
