"""What the load levels say: where throughput stops scaling, where latency blows up, what concurrency buys. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from analysis.load.knee import BlowUp, Gain, Knee, Level, find_blow_up, find_knee, smoothed
from analysis.numbers.intervals import (
    CONFIDENCE,
    Interval,
    Noise,
    Spread,
    mean_log,
    noise_of,
    of_difference,
    pooled,
    pooled_noise,
    scatter_alike,
    spread,
)
from analysis.rows.disturbances import with_others
from analysis.rows.groups import LOAD, Group, Key, grouped
from analysis.rows.series import Reading, Series, make_series
from analysis.rows.tables import RunPoint

P95_JUMP = 2.0
"""A level's p95 is called a jump from this factor over the previous level on."""
NEAR_TARGET = 0.9
"""An achieved concurrency below this share of the level is mentioned: ramp and drain, or a client that lags."""
WHOLE, STEADY = "", "steady_"
"""Beginnings of the columns of a level's two windows. Every verdict and interval rests on the whole run, because not
every level has a steady part, and levels are only compared within one kind of window; docs/definitions.md says more."""
SAME_WINDOW = ("batching", "concurrency")
"""Purposes whose levels are measured alike: on the same server with the same load their repeats have the same noise."""


@dataclass(frozen=True)
class LoadCurve:
    """The levels of one purpose on one server with one workload."""

    series: Series
    server: Key
    """What tells its server and load from others, whatever the purpose (`server_key`)."""
    twins: tuple[Reading, ...] = ()
    """Readings of the same server and load under the other purpose of `SAME_WINDOW`: used for their noise, and to
    contradict what is said of these."""

    @property
    def name(self) -> str:
        """Prefix of the names of its figures."""
        return self.series.name

    @property
    def label(self) -> str:
        """Its model, and what sets its server and load apart from others of that model, for people: the same under
        both purposes of `SAME_WINDOW`."""
        return self.series.group.label

    @property
    def request_tokens(self) -> int:
        """Prompt and answer of one request, in tokens; the mean where lengths are drawn."""
        return (self.series.sample.prompt_tokens or 0) + (self.series.sample.output_tokens or 0)

    @cached_property
    def levels(self) -> tuple[Reading, ...]:
        """Levels with a measured tok/s and p95, ascending."""
        return tuple(reading for reading in self.series.measured if level_of(reading) is not None)

    @property
    def beside_others(self) -> bool:
        """Whether a process of others was on the card at some level: then no reading of the whole curve is known to be
        of its server alone."""
        return any(with_others(level.measured) for level in self.levels)

    @property
    def best(self) -> Reading | None:
        """The level with the highest median tok/s."""
        return max(self.levels, key=lambda r: r.median("tok_s") or 0.0, default=None)

    @cached_property
    def repeats(self) -> tuple[Level, ...]:
        """The same levels with the repeats that knee, blow-up and intervals are computed from."""
        return _levels(self.series.measured)

    @cached_property
    def tok_s_noise(self) -> Noise | None:
        """Noise of tok/s, pooled over the levels; None where no level has repeats."""
        return self.noise("tok_s")

    @cached_property
    def p95_noise(self) -> Noise | None:
        """The same of p95."""
        return self.noise("p95_e2e_s")

    @property
    def noise_from_twins(self) -> bool:
        """Whether no level of the curve has repeats, so that all its noise was read under the other purpose."""
        return not any(level.repeats > 1 for level in self.repeats)

    @property
    def repeated_up_to(self) -> float | None:
        """The highest level with repeats, its twins' included: above it the noise is that of the levels below."""
        every = (*self.repeats, *_levels(self.twins))
        return max((level.at for level in every if level.repeats > 1), default=None)

    @cached_property
    def knee(self) -> Knee:
        """Where throughput stops scaling; undecided with no level at all."""
        return find_knee(self.repeats, self.tok_s_noise)

    @cached_property
    def steady_knee(self) -> Knee | None:
        """The knee by the tok/s of the steady parts alone, to stand beside the other; None where a level has none."""
        steady = _levels(self.series.measured, STEADY)
        if len(steady) < len(self.repeats):
            return None
        return find_knee(steady, pooled_noise(level.tok_s for level in (*steady, *_levels(self.twins, STEADY))))

    @cached_property
    def blow_up(self) -> BlowUp | None:
        """From where p95 outgrows throughput; None where that cannot be known."""
        every = (*self.repeats, *_levels(self.twins))
        return find_blow_up(self.repeats, pooled_noise(level.waiting_per_work for level in every))

    @cached_property
    def smoothed(self) -> dict[float, float]:
        """tok/s of the nearest curve that rises and then falls, by level."""
        return {level.at: value for level, value in zip(self.repeats, smoothed(self.repeats), strict=True)}

    def noise(self, of: str) -> Noise | None:
        """Return the noise of a column of values > 0, pooled over the levels; None where no level has repeats of it."""
        return pooled(self._spreads(of))

    def scatters_alike(self, of: str) -> bool:
        """Return whether that noise may stand for all levels."""
        return scatter_alike(self._spreads(of))

    def noise_at(self, reading: Reading, of: str) -> Noise | None:
        """Return the noise of a column at one level: the pooled, or the level's own where it scatters more."""
        return noise_of(spread(repeats_of(reading, of)), self._spreads(of))

    def _spreads(self, of: str) -> list[Spread]:
        if of not in self._known_spreads:
            every = (*self.series.measured, *self.twins)
            self._known_spreads[of] = [spread(repeats_of(reading, of)) for reading in every]
        return self._known_spreads[of]

    @cached_property
    def _known_spreads(self) -> dict[str, list[Spread]]:
        """By column: every interval and every change of a curve asks for them."""
        return {}

    def interval(self, reading: Reading, of: str) -> Interval | None:
        """Return the interval of a column (`tok_s`, `p95_e2e_s` …) at a level; None where there is no noise to pool."""
        values, noise = repeats_of(reading, of), self.noise_at(reading, of)
        return noise.interval(values) if values and noise is not None else None

    def prediction(self, reading: Reading, of: str) -> Interval | None:
        """Return the interval of a column for one further repeat of a level; None where there is no noise to pool."""
        values, noise = repeats_of(reading, of), self.noise_at(reading, of)
        return noise.prediction(values) if values and noise is not None else None

    def mean(self, reading: Reading, of: str) -> float | None:
        """Return the geometric mean of a column at a level, the middle of its interval."""
        values = repeats_of(reading, of)
        return math.exp(mean_log(values)) if values else None

    def change(self, lower: Reading, upper: Reading, of: str, other: LoadCurve | None = None) -> Gain | None:
        """Return by what share a column's mean changes from one level to another; None where one of them lacks it.

        By t with the noise of either level; where those differ, Welch's (Biometrika 34, 1947). `other` is the curve of
        the second level where that is of another server.
        """
        before, after = repeats_of(lower, of), repeats_of(upper, of)
        if not before or not after:
            return None
        change = mean_log(after) - mean_log(before)
        ours, theirs = self.noise_at(lower, of), (other or self).noise_at(upper, of)
        if ours is None or theirs is None:
            return Gain(math.expm1(change))
        margin = of_difference(ours, len(before), theirs, len(after)).margin(1.0, (1 - CONFIDENCE) / 2)
        return Gain(math.expm1(change), math.expm1(change - margin), math.expm1(change + margin))

    def beaten(self, reading: Reading, other: LoadCurve, level: Reading) -> bool:
        """Return whether a level of another server gives more tok/s than one of this: beyond noise where that is
        known."""
        change = self.change(reading, level, "tok_s", other)
        return change is not None and (change.share if change.low is None else change.low) > 0

    def at(self, level: float) -> Reading:
        """Return the measured level of a concurrency or a rate."""
        return next(reading for reading in self.levels if reading.at == level)

    def previous(self, reading: Reading) -> Reading | None:
        """Return the next lower measured level."""
        return next((a for a, b in pairwise(self.levels) if b is reading), None)

    def following(self, reading: Reading) -> Reading | None:
        """Return the next higher measured level."""
        return next((b for a, b in pairwise(self.levels) if a is reading), None)

    def ratio(self, reading: Reading, base: Reading, column: str) -> float | None:
        """Return the column's median at `reading` over that at `base`."""
        above, below = reading.median(column), base.median(column)
        return above / below if above is not None and below else None


def _levels(readings: Sequence[Reading], window: str = WHOLE) -> tuple[Level, ...]:
    return tuple(level for reading in readings if (level := level_of(reading, window)) is not None)


def repeats_of(reading: Reading, column: str) -> tuple[float, ...]:
    """Return a column's values over the repeats that make up a level, those with both tok/s and p95."""
    return tuple(value for p in reading.measured if p.tok_s and p.p95_e2e_s and (value := getattr(p, column)))


def level_of(reading: Reading, window: str = WHOLE) -> Level | None:
    """Return the repeats of a reading that have both tok/s of a window and p95; None without any.

    p95 is always the whole run's, which is what pages judge: a steady part may be too short for one of its own.
    """
    columns = (f"{window}tok_s", "p95_e2e_s")
    both = [tuple(getattr(p, column) or 0.0 for column in columns) for p in reading.measured]
    pairs = [(tok_s, p95_s) for tok_s, p95_s in both if tok_s > 0 and p95_s > 0]
    return Level(reading.at, tuple(t for t, _ in pairs), tuple(p95 for _, p95 in pairs)) if pairs else None


def load_curves(points: Sequence[RunPoint], purpose: str) -> list[LoadCurve]:
    """Return one curve per server and workload for the points of a purpose.

    What a label must tell apart are all servers that were sent load for this purpose or the other of `SAME_WINDOW`.
    """
    alike = SAME_WINDOW if purpose in SAME_WINDOW else (purpose,)
    servers = grouped([point for point in points if point.purpose in alike], LOAD)
    of_point = {id(point): server for server in servers for point in server.points}
    others = [series for other in alike if other != purpose for series in _series(points, other)]
    curves = []
    for series in _series(points, purpose):
        server = of_point[id(series.group.points[0])]
        same = [other for other in others if of_point[id(other.group.points[0])] is server]
        twins = tuple(reading for other in same for reading in other.measured)
        named = replace(series, group=replace(series.group, label=server.label))
        curves.append(LoadCurve(named, server_key(server), twins))
    return curves


def knee_curves(points: Sequence[RunPoint]) -> list[LoadCurve]:
    """Return the curve that the knee is read from of each server and load: of the concurrency sweep and the batching
    levels those that go higher, where two of them were measured; the sweep where both go as high."""
    return one_per_server(curve for purpose in ("concurrency", "batching") for curve in load_curves(points, purpose))


def closed_loops(points: Sequence[RunPoint]) -> list[LoadCurve]:
    """Return the curves that a run's answers on closed loops rest on: those of `knee_curves`, then the near-full
    contexts."""
    return [*knee_curves(points), *load_curves(points, "near_full_context")]


def server_key(group: Group) -> Key:
    """Return what points of one server under one load have in common, as known to the one that learned most."""
    return tuple(getattr(group.points[0], column) for column in LOAD)


def one_per_server(curves: Iterable[LoadCurve]) -> list[LoadCurve]:
    """Return one curve of each server and load: of those with two levels or more the one that goes highest, so that no
    level lies above what is said of them all; the first where several go as high."""
    by_server: dict[Key, list[LoadCurve]] = {}
    for curve in curves:
        by_server.setdefault(curve.server, []).append(curve)
    return [max(own, key=_tells) for own in by_server.values()]


def _tells(curve: LoadCurve) -> tuple[int, float]:
    return min(len(curve.levels), 2), curve.levels[-1].at if curve.levels else 0


def _series(points: Sequence[RunPoint], purpose: str) -> list[Series]:
    return make_series([point for point in points if point.purpose == purpose], LOAD, "concurrency", purpose)
