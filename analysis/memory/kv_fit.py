"""What the memory readings say: slopes, lines, steps and capacity of one model on one kind of card. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from analysis.numbers.statistics import LinearFit, linear_fit
from analysis.rows.groups import BASE, COMMITTED, UTILIZATION, Group, grouped
from analysis.rows.series import Reading, Series, make_series
from analysis.rows.tables import RunPoint

CUDA_SEGMENT_BYTES = 2 * 2**20
"""torch's caching allocator hands out device memory in multiples of this; NVML sees nothing finer."""
HOST_SCATTER_BYTES = 8 * 2**20
"""The PSS of a server's process tree differs by about so much from start to start (libraries shared with others)."""
STEP_SHARE = 0.01
"""A difference between two lengths is called a step when it departs from the expected one by more than this share
and by more than what memory can be told apart by (`Interval.granularity_bytes`)."""
LINEAR_R_SQUARED = 0.99
LINEAR_RESIDUAL = 0.05
"""Roughly linear: R² at least the first, the largest residual at most this share of the memory's range."""
FLAT_BYTES = 10 * 2**20
"""Flat: the range over all lengths is at most this, for each card."""
HOST_FLAT_SHARE = 0.05
"""The same for the CPU backend, as a share: it cuts its pool from the resident set of its worker at that moment."""
WARM_BESIDE = "warm beside another server"


def page_sharing(points: Iterable[RunPoint]) -> set[str]:
    """Return how the CPU backend's servers were started, which decides what pages they share; nothing for cards.

    Memory there is a sum of PSS, in which each process that has a page counts its part of it. A forked server shares
    what was imported with its parent, and with every other server of that parent while that lives.
    """
    started = [point for point in points if point.device == "cpu" and point.start]
    return {WARM_BESIDE if p.start == "warm" and p.co_running_sessions else str(p.start) for p in started}


def may_differ(points: Iterable[RunPoint]) -> bool:
    """Return whether a difference of these points' memory means anything, as far as page sharing goes."""
    return len(found := page_sharing(points)) <= 1 and WARM_BESIDE not in found


def is_one_curve(series: Series) -> bool:
    """Return `may_differ` of all that the series has measured."""
    return may_differ(point for reading in series.measured for point in reading.measured)


def flat_bytes(sample: RunPoint, highest: float) -> float:
    """Return up to which range over all lengths a memory whose highest is `highest` is called flat; bytes."""
    return HOST_FLAT_SHARE * highest if sample.device == "cpu" else FLAT_BYTES * (sample.tensor_parallel_size or 1)


@dataclass(frozen=True, slots=True)
class Interval:
    """Two neighbouring measured lengths of a pool that was sized to the length."""

    shorter: Reading
    longer: Reading
    sequences: int | None
    column: str
    """`mem_ready_bytes` or `mem_loaded_bytes`."""

    @property
    def delta_bytes(self) -> float | None:
        """Memory at the longer length less memory at the shorter."""
        return _difference(self.longer.median(self.column), self.shorter.median(self.column))

    @property
    def tokens(self) -> float:
        """Further tokens of one sequence."""
        return self.longer.at - self.shorter.at

    @property
    def bytes_per_token(self) -> float | None:
        """delta_bytes / (further tokens * sequences): the tutorial's estimate with its divisor made explicit."""
        if self.delta_bytes is None or not self.sequences:
            return None
        return self.delta_bytes / (self.tokens * self.sequences)

    @property
    def expected_bytes(self) -> float | None:
        """sequences * difference of the formula's bytes per sequence (whole blocks)."""
        change = _difference(*(r.median("formula_bytes_per_sequence") for r in (self.longer, self.shorter)))
        return change * self.sequences if change is not None and self.sequences else None

    @property
    def departure_bytes(self) -> float | None:
        """Measured less expected difference."""
        return _difference(self.delta_bytes, self.expected_bytes)

    @property
    def granularity_bytes(self) -> float:
        """What no departure below means anything: `told_apart_bytes` of the longer length."""
        return told_apart_bytes(self.longer)

    @property
    def is_step(self) -> bool:
        """Whether the departure is beyond granularity and beyond `STEP_SHARE` of what was expected."""
        departure, expected = self.departure_bytes, self.expected_bytes
        if departure is None or expected is None:
            return False
        return abs(departure) > max(self.granularity_bytes, STEP_SHARE * abs(expected))


@dataclass(frozen=True, slots=True)
class Committed:
    """One series of pools sized to the length: `sequences` full-length sequences at every length."""

    series: Series

    @property
    def sequences(self) -> int | None:
        """The divisor: full-length sequences that every pool was sized for."""
        return self.series.sample.sequences

    def fit(self, column: str) -> LinearFit | None:
        """Return the line of a memory column over max_model_len (bytes per token of length, all sequences together).

        None through fewer than two lengths, and through memory that is no curve (`is_one_curve`).
        """
        if not is_one_curve(self.series):
            return None
        known = [
            (reading.at, value) for reading in self.series.measured if (value := reading.median(column)) is not None
        ]
        return linear_fit([x for x, _ in known], [y for _, y in known])

    def bytes_per_token(self, column: str) -> float | None:
        """Return the fitted slope / sequences."""
        fit = self.fit(column)
        return fit.slope / self.sequences if fit and self.sequences else None

    def is_linear(self, column: str) -> bool | None:
        """Return whether a line describes the column; None for fewer than three lengths, which decide nothing."""
        fit = self.fit(column)
        if fit is None or fit.points < 3 or fit.r_squared is None:
            return None
        values = [value for reading in self.series.measured if (value := reading.median(column)) is not None]
        return fit.r_squared >= LINEAR_R_SQUARED and fit.max_residual <= LINEAR_RESIDUAL * (max(values) - min(values))

    def intervals(self, column: str = "mem_ready_bytes") -> list[Interval]:
        """Return the neighbouring pairs of lengths that both hold the column; none of what is no curve."""
        if not is_one_curve(self.series):
            return []
        known = [reading for reading in self.series.measured if reading.median(column) is not None]
        return [Interval(shorter, longer, self.sequences, column) for shorter, longer in pairwise(known)]


@dataclass(frozen=True, slots=True)
class KvResult:
    """Everything the memory points say about one model on one kind of card."""

    group: Group
    committed: tuple[Committed, ...]
    capacity: tuple[Series, ...]
    """Utilization mode: one series per server configuration and utilization."""

    @property
    def name(self) -> str:
        """Prefix of the names of its figures."""
        return f"kv.{self.group.slug}"

    def file_stem(self, kind: str, number: int) -> str:
        """Return the name, less its suffix, of its file of a kind; of the results that have one it is the `number`-th,
        from 0, and the first owns the plain name."""
        return f"{kind}.{self.group.slug}" if number else kind

    @property
    def series(self) -> list[Series]:
        """Those of both modes, committed pools first."""
        return [*(committed.series for committed in self.committed), *self.capacity]

    @property
    def readings(self) -> list[Reading]:
        """All measured readings of both modes, by length."""
        return sorted((r for series in self.series for r in series.measured), key=lambda reading: reading.at)

    @property
    def sample(self) -> RunPoint:
        """A point that stands for them all: of the shortest length measured, if there is one."""
        readings = self.readings
        return readings[0].measured[0] if readings else self.group.points[0]

    @property
    def pool(self) -> Series | None:
        """The series whose pool stands for the card: the highest utilization that holds a measured length."""
        measured = [series for series in self.capacity if series.measured]
        return max(measured, key=lambda s: s.sample.gpu_memory_utilization or 0, default=None)

    @property
    def formula_slope(self) -> float | None:
        """Least-squares slope of the formula's bytes per sequence over the lengths measured; bytes per token.

        Of committed pools where there are any, since a memory slope is held against it. For one length only: the
        formula's marginal cost of a token at that length.
        """
        committed = _per_sequence([r for c in self.committed for r in c.series.measured])
        known = committed if len(committed) > 1 else self.per_sequence()
        fit = linear_fit(list(known), list(known.values()))
        return fit.slope if fit else self.formula_marginal

    @property
    def formula_marginal(self) -> float | None:
        """The formula's cost of one more token at the longest length measured."""
        values = [v for r in self.readings if (v := r.median("formula_bytes_per_token")) is not None]
        return values[-1] if values else None

    def per_sequence(self) -> dict[int, float]:
        """Return the KV bytes of one full-length sequence by length, from the formula's column."""
        return _per_sequence(self.readings)


def _per_sequence(readings: Sequence[Reading]) -> dict[int, float]:
    return {int(r.at): v for r in readings if (v := r.median("formula_bytes_per_sequence")) is not None}


def pool_bytes(reading: Reading) -> float | None:
    """Return the KV pool over all GPUs of a session: gpus * engine_kv_bytes."""
    one = reading.median("engine_kv_bytes")
    return None if one is None else one * max(reading.measured[0].gpus, 1)


def block_bytes(reading: Reading) -> float | None:
    """Return the size of one block over all GPUs: pool / blocks."""
    pool, blocks = pool_bytes(reading), reading.median("engine_num_blocks")
    return pool / blocks if pool is not None and blocks else None


def told_apart_bytes(reading: Reading) -> float:
    """Return what memory is told apart by: one KV block over all ranks, plus the allocator's unit on each card or the
    host's scatter."""
    sample = reading.measured[0]
    unit = HOST_SCATTER_BYTES if sample.device == "cpu" else CUDA_SEGMENT_BYTES
    return (block_bytes(reading) or 0) + unit * max(sample.gpus, 1)


def kv_results(points: Sequence[RunPoint]) -> list[KvResult]:
    """Return the results of all memory points of purpose kv_scaling, one per model and kind of card."""
    rows = [point for point in points if point.purpose == "kv_scaling"]
    committed = make_series([p for p in rows if p.mode == "committed"], COMMITTED, "max_model_len", "committed")
    capacity = make_series([p for p in rows if p.mode == "utilization"], UTILIZATION, "max_model_len", "utilization")
    results = []
    for group in grouped(rows, BASE):
        ids = {id(point) for point in group.points}
        results.append(
            KvResult(
                group,
                tuple(Committed(series) for series in committed if id(series.group.points[0]) in ids),
                tuple(series for series in capacity if id(series.group.points[0]) in ids),
            )
        )
    return results


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
