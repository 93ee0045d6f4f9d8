"""One objective held against one level, the noise of its repeats counted. Pure.

The rule of operating_point.md, and of the search (`orchestrator.search.slo`) as soon as levels have repeats. Until then
there is no noise to count, and the search goes repeat by repeat: `analysis.load.objectives`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from analysis.load.load_curve import WHOLE, LoadCurve
from analysis.load.objectives import holds, states
from analysis.numbers.intervals import Interval
from analysis.rows.groups import Group
from analysis.rows.series import Reading, Series, reading_of
from analysis.rows.tables import run_point
from analysis.rows.targets import Slo
from contract.rows import PointRow

BETWEEN_STARTS = 0.10
"""Two starts of one server on one card were seen to differ by 10 % in p95 at concurrency 1
(docs/measured_on_gpus.md): the noise of repeats on one server does not hold that."""


class Standing(StrEnum):
    """How a level stands to an objective, or to all of them."""

    MEETS = "meets"
    MISSES = "misses"
    UNDECIDED = "undecided"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Check:
    """One objective held against one level."""

    column: str
    """`p95_e2e_s`, `p95_ttft_s` or `p95_tpot_s`."""
    limit_s: float
    value: float | None
    """The median of the repeats."""
    interval: Interval | None
    """Of the repeats' geometric mean; None where no noise is known."""
    nothing_to_miss: bool = False
    """Whether it is TPOT and every answer has one token: then no repeat can miss it, and none has a value."""

    @property
    def standing(self) -> Standing:
        """The whole interval below the limit, above it, or across it; without an interval nothing is decided."""
        if self.nothing_to_miss:
            return Standing.MEETS
        if self.interval is None:
            return Standing.UNDECIDED
        if self.interval.high <= self.limit_s:
            return Standing.MEETS
        return Standing.MISSES if self.interval.low > self.limit_s else Standing.UNDECIDED

    @property
    def thin(self) -> bool:
        """Whether it is met by less than what starts of one server were seen to differ by."""
        if self.interval is None or self.standing is not Standing.MEETS:
            return False
        return self.interval.high > (1 - BETWEEN_STARTS) * self.limit_s

    @property
    def met_as_measured(self) -> bool:
        """Whether the median lies within the limit and its noise is not known."""
        return self.interval is None and self.value is not None and self.value <= self.limit_s

    @property
    def met(self) -> bool | None:
        """Whether it is met: beyond noise where that is known, else by the median; None where neither tells."""
        if self.standing is not Standing.UNDECIDED:
            return self.standing is Standing.MEETS
        return None if self.interval is not None or self.value is None else self.met_as_measured


def all_met(checks: Sequence[Check]) -> bool | None:
    """Return whether all objectives are met, as `Check.met` says of each; None where one is open and none is missed."""
    each = {check.met for check in checks}
    return False if False in each else None if None in each else True


def checks_of(curve: LoadCurve, reading: Reading, slo: Slo, window: str = WHOLE) -> tuple[Check, ...]:
    """Return every objective held against a level, or against its steady part."""
    return tuple(
        Check(
            column,
            limit,
            reading.median(window + column),
            curve.interval(reading, window + column),
            nothing_to_miss=column == "p95_tpot_s" and of_one_token(reading),
        )
        for column, limit in slo.percentiles().items()
    )


def of_one_token(reading: Reading) -> bool:
    """Return whether every answer of a level has one token, and so none a TPOT: (E2EL - TTFT) / (tokens - 1)."""
    tokens = {point.mean_completion_tokens or point.output_tokens for point in reading.measured}
    return tokens == {1} and not reading.values("p95_tpot_s")


def standing_of(checks: Sequence[Check], keeps_up: bool | None) -> Standing:
    """Return how a measured level stands to all objectives; a rate that the server does not keep up with meets none."""
    each = {check.standing for check in checks}
    if keeps_up is False or Standing.MISSES in each:
        return Standing.MISSES
    return Standing.UNDECIDED if keeps_up is None or Standing.UNDECIDED in each else Standing.MEETS


def keeps_up(reading: Reading) -> bool | None:
    """Return whether the server ended as many as were sent, which a closed loop sees to by itself; None where the
    repeats of an open loop do not tell, or do not agree."""
    if all(point.arrivals is None for point in reading.measured):
        return True
    verdicts = {point.keeps_up for point in reading.measured if point.keeps_up is not None}
    return verdicts.pop() if len(verdicts) == 1 else None


def contradicted(curve: LoadCurve, reading: Reading, slo: Slo) -> bool:
    """Return whether a level meets all objectives, and its twin, measured under the other purpose, misses one."""
    if _by_itself(curve, reading, slo) is not Standing.MEETS:
        return False
    twins = [twin for twin in curve.twins if twin.at == reading.at]
    return any(_by_itself(curve, twin, slo) is Standing.MISSES for twin in twins)


def standing_at(curve: LoadCurve, reading: Reading, slo: Slo) -> Standing:
    """Return how a measured level of a curve stands to all objectives, its twin heard."""
    return Standing.UNDECIDED if contradicted(curve, reading, slo) else _by_itself(curve, reading, slo)


def _by_itself(curve: LoadCurve, reading: Reading, slo: Slo) -> Standing:
    return standing_of(checks_of(curve, reading, slo), keeps_up(reading))


def standings(levels: Mapping[float, Sequence[PointRow]], slo: Slo) -> dict[float, bool | None]:
    """Return for each level whether it meets all objectives (True), misses one (False), or is undecided.

    Of the rows of one server and load, by level, ascending. As on the page, but that a rate whose repeats cannot tell
    whether the server keeps up is left to its p95, and that a level where too many requests of a repeat failed does not
    meet. Repeat by repeat (`states`) while no level has two.
    """
    known, curve = states(levels, slo), _curve(levels)
    if curve.tok_s_noise is None:
        return known
    for reading in curve.levels:
        kept_up = keeps_up(reading)
        if kept_up is None and not any(point.keeps_up is False for point in reading.measured):
            kept_up = True
        found = standing_of(checks_of(curve, reading, slo), kept_up)
        if found is Standing.MEETS and any(holds(point, slo) is False for point in reading.unmeasured):
            found = Standing.UNDECIDED
        known[reading.at] = {Standing.MEETS: True, Standing.MISSES: False}.get(found)
    return known


def _curve(levels: Mapping[float, Sequence[PointRow]]) -> LoadCurve:
    points = {at: [run_point(row) for row in rows] for at, rows in levels.items()}
    readings = tuple(reading_of(f"{at:g}", at, own) for at, own in points.items())
    group = Group("", "", tuple(point for own in points.values() for point in own), first=True)
    return LoadCurve(Series("", group, readings), ())
