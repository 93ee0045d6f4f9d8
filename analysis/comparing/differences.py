"""How two runs differ at each point that both hold, with an interval, and whether it is more than noise. Pure.

Load: repeats tell the noise, those of all levels and those of the level itself (`_margin`). Memory has one reading a
server; what it can be told apart by is known instead: a KV block and what the allocator or the host rounds by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from analysis.comparing.matching import Pair
from analysis.load.load_curve import SAME_WINDOW
from analysis.memory.kv_fit import may_differ, told_apart_bytes
from analysis.numbers.intervals import CONFIDENCE, Noise, Spread, mean_log, pooled, spread
from analysis.numbers.statistics import median
from analysis.rows.groups import LOAD
from analysis.rows.series import Reading, Series
from analysis.rows.tables import RunPoint


@dataclass(frozen=True, slots=True)
class Metric:
    """A column that is compared."""

    column: str
    more_is_better: bool


LOAD_METRICS = (
    Metric("tok_s", True),
    Metric("p95_e2e_s", False),
    Metric("p95_ttft_s", False),
    Metric("p95_tpot_s", False),
)
MEMORY_METRICS = (Metric("mem_ready_bytes", False), Metric("engine_kv_bytes", True))


STARTS_APART = "one side's servers were forked, and on GPUs these were seen to be slower where few requests run"
OF_OTHERS = "one repeat in both runs; the noise is that of other levels"
"""Of a level whose own noise nobody knows, which may be more than theirs."""
ROUNDING = 1e-9
"""Of logarithms: repeats that are all alike have no noise, and differ by this from run to run."""


class Verdict(StrEnum):
    """Whether a difference is more than noise, and which way."""

    BETTER = "better"
    WORSE = "worse"
    NOISE = "within noise"
    UNKNOWN = "not known"


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric at one point of two runs."""

    pair: Pair
    at: float
    metric: Metric
    base: float
    """Geometric mean of the repeats; of memory, the median."""
    other: float
    base_repeats: int
    other_repeats: int
    low: float | None
    """Of the interval of `change`; None where no noise is known."""
    high: float | None
    verdict: Verdict
    why: str = ""
    """Why the verdict is not known, or what stood in for noise."""

    @property
    def change(self) -> float:
        """other / base - 1."""
        return self.other / self.base - 1


def differences(found: Sequence[Pair], together: bool = False) -> list[Difference]:
    """Return the differences at every level of every pair, in order.

    Each interval holds with `CONFIDENCE`; with `together` all of them at once do (Bonferroni: Dunn, Journal of the
    American Statistical Association 56, 1961), so that among many points chance alone hardly makes one stand out.
    A level with one repeat in both runs has the noise of the others, which keeps no such promise: `together` leaves its
    verdict open, else `why` says so.
    """
    cases = [
        _Case(pair, metric, one, another)
        for pair in found
        for one, another in pair.levels
        for metric in (MEMORY_METRICS if pair.family.purpose == "kv_scaling" else LOAD_METRICS)
        if _positive(one, metric) and _positive(another, metric)
    ]
    spreads = {(id(pair), m): _spreads(_same_window(pair, found), m) for pair in found for m in LOAD_METRICS}
    judged = sum(case.metric in LOAD_METRICS and case.own_noise is not None for case in cases)
    tail = (1 - CONFIDENCE) / 2 / (max(judged, 1) if together else 1)
    return [
        _memory(case)
        if case.metric in MEMORY_METRICS
        else _load(case, spreads[id(case.pair), case.metric], tail, judge_by_others=not together)
        for case in cases
    ]


@dataclass(frozen=True, slots=True)
class _Case:
    pair: Pair
    metric: Metric
    base: Reading
    other: Reading

    @property
    def own_noise(self) -> Noise | None:
        """That of the two levels' own repeats; None where both have one."""
        return pooled([spread(_positive(reading, self.metric)) for reading in (self.base, self.other)])


def _positive(reading: Reading, metric: Metric) -> list[float]:
    return [value for value in reading.values(metric.column) if 0 < value < math.inf]


def _same_window(pair: Pair, found: Sequence[Pair]) -> list[Pair]:
    """Return the pairs whose levels have the same noise: those of the same server and load that are measured alike."""
    if pair.family.purpose not in SAME_WINDOW:
        return [pair]
    alike = [other for other in found if other.family.purpose in SAME_WINDOW]
    return [
        other
        for other in alike
        if _server(other.base) == _server(pair.base) and _server(other.other) == _server(pair.other)
    ]


def _server(series: Series) -> tuple[object, ...]:
    return tuple(getattr(series.sample, column) for column in LOAD)


def _spreads(alike: Sequence[Pair], metric: Metric) -> list[Spread]:
    """Return how far the repeats of each level of both runs scatter."""
    readings = [reading for pair in alike for series in (pair.base, pair.other) for reading in series.measured]
    return [spread(values) for reading in readings if (values := _positive(reading, metric))]


def _load(case: _Case, every: Sequence[Spread], tail: float, judge_by_others: bool) -> Difference:
    ours, theirs = _positive(case.base, case.metric), _positive(case.other, case.metric)
    step = mean_log(theirs) - mean_log(ours)
    low = high = None
    verdict, why = Verdict.UNKNOWN, "one repeat"
    margin, own = _margin(case, every, tail), case.own_noise
    if margin is not None:
        low, high = math.expm1(step - margin), math.expm1(step + margin)
        why = OF_OTHERS if own is None else ""
        if own is not None or judge_by_others:
            verdict = _side(case.metric, step, margin)
    if starts_apart(case.base.measured, case.other.measured):
        verdict, why = Verdict.UNKNOWN, STARTS_APART
    means = math.exp(mean_log(ours)), math.exp(mean_log(theirs))
    return Difference(
        case.pair, case.base.at, case.metric, *means, len(ours), len(theirs), low, high, verdict, why
    )  # fmt: skip


def starts_apart(base: Iterable[RunPoint], other: Iterable[RunPoint]) -> bool:
    """Whether the two were measured on cards, on servers that were started in different ways (docs/warm_starts.md)."""
    one, two = ({point.start for point in side if point.device == "cuda" and point.start} for side in (base, other))
    return bool(one and two) and one != two


def _margin(case: _Case, every: Sequence[Spread], tail: float) -> float | None:
    """Return the wider of two margins of the difference of two levels' mean logarithms; None where no noise is known.

    One is right where all levels of both runs scatter alike, for it pools them; the other where only the two levels do,
    whose repeats alone it takes (Student, Biometrika 6, 1908). So it is right where either is, and no test has to tell
    which: one with the power of three repeats would let a level that scatters more pass for the others.
    """
    noises = pooled(every), case.own_noise
    variance_of_one = sum(1 / len(_positive(reading, case.metric)) for reading in (case.base, case.other))
    return max((noise.margin(variance_of_one, tail) for noise in noises if noise is not None), default=None)


def _memory(case: _Case) -> Difference:
    ours, theirs = _positive(case.base, case.metric), _positive(case.other, case.metric)
    base, other = median(ours), median(theirs)
    if case.base.measured[0].device == "cpu" and case.pair.family.mode == "utilization":
        return Difference(
            case.pair, case.base.at, case.metric, base, other, len(ours), len(theirs), None, None, Verdict.UNKNOWN,
            "cut from what was resident at that moment",
        )  # fmt: skip
    if case.metric.column != "engine_kv_bytes" and not may_differ((*case.base.measured, *case.other.measured)):
        return Difference(
            case.pair, case.base.at, case.metric, base, other, len(ours), len(theirs), None, None, Verdict.UNKNOWN,
            "servers that were started otherwise, or beside each other, share other pages",
        )  # fmt: skip
    ranks = max(case.base.measured[0].gpus, 1) if case.metric.column == "engine_kv_bytes" else 1  # it is one card's
    unit = max(told_apart_bytes(case.base), told_apart_bytes(case.other)) / ranks
    low, high = ((other - base + side * unit) / base for side in (-1, 1))
    return Difference(
        case.pair, case.base.at, case.metric, base, other, len(ours), len(theirs), low, high,
        _side(case.metric, other - base, unit), f"told apart by {unit / 2**20:.0f} MiB",
    )  # fmt: skip


def _side(metric: Metric, step: float, margin: float) -> Verdict:
    if abs(step) <= margin + ROUNDING:
        return Verdict.NOISE
    return Verdict.BETTER if (step > 0) == metric.more_is_better else Verdict.WORSE
