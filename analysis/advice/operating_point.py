"""Which server and level to run: chosen among measured levels by the objectives, with the noise counted. Pure.

The page about it is `operating_page`. What is chosen is a row that was measured, never a point between two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from analysis.load.checks import Check, Standing, all_met, checks_of, contradicted, keeps_up, standing_of
from analysis.load.knee import KneeVerdict
from analysis.load.load_curve import STEADY, WHOLE, LoadCurve, level_of, load_curves, one_per_server
from analysis.load.rates import rate_curves
from analysis.load.token_cost import Price, joules_per_output_token, price_per_million
from analysis.memory.kv_pages import Configs, Pages, pages_of
from analysis.memory.kv_room import KvRoom, kv_room
from analysis.rows.groups import BASE, Group, grouped
from analysis.rows.series import Reading
from analysis.rows.tables import RunPoint, Tables
from analysis.rows.targets import Slo

CLOSED_LOOPS = ("concurrency", "batching", "near_full_context")
"""Purposes whose levels can be run: those of `+sweep=knee` and `+sweep=slo` are of `concurrency`. An envelope's cells
cannot: they are not warmed up, and too short for their latencies to be a service's."""
WORKLOAD = ("api", "prompt_tokens", "output_tokens", "prompt_lengths", "output_lengths", "shared_prefix", "arrivals")
"""Servers compete where they were sent the same load."""


class Basis(StrEnum):
    """Why a level was chosen."""

    OBJECTIVES = "highest tok/s of the levels that meet every objective, noise counted"
    AS_MEASURED = "the same by its single repeats, whose noise is not known"
    KNEE = "no objective: of the levels tested the lowest that could be the knee"
    NONE = "not known from this run"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A level that could be run, and how it stands to the objectives."""

    curve: LoadCurve
    reading: Reading
    checks: tuple[Check, ...]
    keeps_up: bool | None = True
    """Of an open loop: whether the server ended as many as were sent, None where it cannot be told."""
    contradicted: bool = False
    """Whether the same level of the same server, measured under another purpose, misses what this one meets."""
    steady_checks: tuple[Check, ...] = ()
    """The objectives held against its steady part; none where that is not free of the opening burst."""

    @property
    def measured(self) -> bool:
        """Whether it has a tok/s and a p95."""
        return level_of(self.reading) is not None

    @property
    def standing(self) -> Standing:
        """Over all objectives; a rate that the server does not keep up with meets none."""
        if not self.measured:
            return Standing.NOT_MEASURED
        found = standing_of(self.checks, self.keeps_up)
        return Standing.UNDECIDED if self.contradicted and found is Standing.MEETS else found

    @property
    def thin(self) -> bool:
        """Whether it meets every objective, one of them by less than what starts of one server may differ by."""
        return self.standing is Standing.MEETS and any(check.thin for check in self.checks)

    @property
    def met_as_measured(self) -> bool:
        """Whether every objective is met, at least one of them only as far as repeats without known noise say."""
        return (
            self.standing is Standing.UNDECIDED
            and self.keeps_up is True
            and not self.contradicted
            and all(check.met_as_measured or check.standing is Standing.MEETS for check in self.checks)
        )

    @property
    def missed_as_measured(self) -> bool:
        """Whether an objective is missed by repeats whose noise is not known."""
        return any(c.interval is None and c.value is not None and c.value > c.limit_s for c in self.checks)

    @property
    def met_when_steady(self) -> bool | None:
        """Whether its steady part meets every objective where the whole run is not known to (True), or misses one where
        the whole run meets them all (False); None where the two agree, or the steady part does not tell."""
        if not self.steady_checks:
            return None
        whole, steady = all_met(self.checks), all_met(self.steady_checks)
        if steady and not whole:
            return True
        return False if steady is False and whole else None

    def misses(self, column: str) -> bool:
        """Whether it misses the objective for a p95, beyond noise where that is known."""
        return any(check.column == column and check.met is False for check in self.checks)


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """The chosen level and what it gives; medians of its repeats, None where the rows do not hold it."""

    curve: LoadCurve
    reading: Reading
    safe_up_to: Reading | None
    """The highest level of the run of neighbours from it upwards that are known to hold; None where noise is not
    known."""
    tok_s: float
    p95_e2e_s: float
    pages: Pages | None
    """The page function of its server's KV pool, where the model's config is known."""
    room: KvRoom | None
    """What the level leaves of the KV pool, in bytes and in requests of this load."""
    goodput_qps: float | None
    joules_per_output_token: float | None
    price: Price | None

    def room_for(self, tokens: int, requests: float) -> KvRoom | None:
        """Return the same for other requests: so many at once of so many tokens."""
        return kv_room(self.reading, tokens, requests, self.pages)

    @property
    def p95_upper_s(self) -> float | None:
        """The upper end of the interval of p95_e2e_s."""
        interval = self.curve.interval(self.reading, "p95_e2e_s")
        return None if interval is None else interval.high


@dataclass(frozen=True, slots=True)
class Choice:
    """The operating point of one load on one model and kind of card: over all servers that were sent this load."""

    group: Group
    curves: tuple[LoadCurve, ...]
    slo: Slo
    candidates: tuple[Candidate, ...]
    basis: Basis
    point: OperatingPoint | None

    @property
    def open_loop(self) -> bool:
        """Whether levels are arrival rates and not concurrencies."""
        return self.sample.arrivals is not None

    @property
    def sample(self) -> RunPoint:
        """A point that stands for the load."""
        return next((c.reading.measured[0] for c in self.candidates if c.measured), self.group.points[0])

    @property
    def servers(self) -> list[LoadCurve]:
        """One curve of each server of which a level was measured: that which its knee is read from."""
        return _measured_servers(self.curves)

    @property
    def curve(self) -> LoadCurve | None:
        """The curve to speak of: that of the operating point, else of the server with the highest tok/s; None where
        nothing was measured."""
        return self.point.curve if self.point is not None else max(self.servers, key=most_tok_s, default=None)

    @property
    def thin(self) -> bool:
        """Whether the chosen level meets an objective by less than what starts of one server may differ by."""
        return self.point is not None and any(c.thin for c in self.candidates if c.reading is self.point.reading)

    def having(self, standing: Standing) -> list[Candidate]:
        """Return the candidates of a standing."""
        return [candidate for candidate in self.candidates if candidate.standing is standing]


def choices(tables: Tables, slo: Slo, gpu_hour: float | None) -> list[Choice]:
    """Return one choice for every load on every model and kind of card: closed loops first, near-full contexts and
    open loops after them. `tables` with goodput where that is to be known (`analysis.load.goodput`)."""
    points = tables.points
    curves = [curve for purpose in CLOSED_LOOPS for curve in load_curves(points, purpose)] + rate_curves(points)
    made = []
    for group in grouped([point for curve in curves for point in curve.series.group.points], (*BASE, *WORKLOAD)):
        ids = {id(point) for point in group.points}
        own = tuple(curve for curve in curves if id(curve.series.group.points[0]) in ids)
        made.append(choose(group, own, slo, gpu_hour, tables.configs))
    return sorted(made, key=_order)


def _order(choice: Choice) -> int:
    purposes = (*CLOSED_LOOPS, "rate")
    return min(purposes.index(curve.series.sample.purpose) for curve in choice.curves)


def choose(group: Group, curves: tuple[LoadCurve, ...], slo: Slo, gpu_hour: float | None, configs: Configs) -> Choice:
    """Return the choice among the levels of these curves, all of one load."""
    candidates = tuple(_candidate(curve, reading, slo) for curve in curves for reading in curve.series.readings)
    basis, chosen = _pick(candidates, curves, slo)
    point = None if chosen is None else _operating_point(chosen, candidates, basis, gpu_hour, configs)
    return Choice(group, curves, slo, candidates, basis, point)


def _candidate(curve: LoadCurve, reading: Reading, slo: Slo) -> Candidate:
    checks, steady = (checks_of(curve, reading, slo, window) for window in (WHOLE, STEADY))
    return Candidate(
        curve,
        reading,
        checks,
        keeps_up(reading),
        contradicted(curve, reading, slo),
        steady if without_opening_burst(reading) else (),
    )


def without_opening_burst(reading: Reading) -> bool:
    """Return whether the steady latencies of a closed loop's level begin after its opening burst: an open loop has
    none, and rows of before schema version 9 have it among them."""
    settled = reading.values("steady_settled_s")
    return bool(settled) and len(settled) == len(reading.measured) and reading.measured[0].arrivals is None


def _pick(candidates: Sequence[Candidate], curves: Sequence[LoadCurve], slo: Slo) -> tuple[Basis, Candidate | None]:
    if not slo.percentiles():
        knee = _at_the_knee(candidates, _measured_servers(curves))
        return (Basis.NONE, None) if knee is None else (Basis.KNEE, knee)
    held = [c for c in candidates if c.standing is Standing.MEETS]
    if held:
        return Basis.OBJECTIVES, max(held, key=_throughput)
    held = [c for c in candidates if c.met_as_measured]
    return (Basis.AS_MEASURED, max(held, key=_throughput)) if held else (Basis.NONE, None)


def _measured_servers(curves: Iterable[LoadCurve]) -> list[LoadCurve]:
    """Return the curve that the knee is read from of each server of which a level was measured."""
    return [curve for curve in one_per_server(curves) if curve.levels]


def _at_the_knee(candidates: Sequence[Candidate], servers: Sequence[LoadCurve]) -> Candidate | None:
    """The knee with the highest tok/s of all servers; None where one whose throughput is not known to stop scaling
    gives more than that."""
    lowest = {(curve.name, curve.knee.could_be[0]) for curve in servers if curve.knee.could_be}
    at_knees = [c for c in candidates if (c.curve.name, c.reading.at) in lowest]
    best = max(at_knees, key=_throughput, default=None)
    if best is None or best.curve.series.sample.arrivals is not None:
        return None
    rising = {curve.server for curve in servers if not curve.knee.could_be}
    rivals = [(c.curve, c.reading) for c in candidates if c.measured and c.curve.server in rising]
    return None if any(best.curve.beaten(best.reading, curve, level) for curve, level in rivals) else best


def most_tok_s(curve: LoadCurve) -> float:
    """Return the highest tok/s of a curve's levels, medians of their repeats; 0 without a level."""
    return 0.0 if curve.best is None else curve.best.median("tok_s") or 0.0


def _throughput(candidate: Candidate) -> float:
    """tok/s; of an open loop, whose throughput is that of its arrivals, the rate."""
    if candidate.curve.series.sample.arrivals is not None:
        return candidate.reading.at
    return candidate.reading.median("tok_s") or 0.0


def _operating_point(
    chosen: Candidate, candidates: Sequence[Candidate], basis: Basis, gpu_hour: float | None, configs: Configs
) -> OperatingPoint:
    curve, reading = chosen.curve, chosen.reading
    pages = pages_of(reading.measured[0], configs)
    return OperatingPoint(
        curve,
        reading,
        _safe_up_to(chosen, candidates, basis),
        tok_s=reading.median("tok_s") or 0.0,
        p95_e2e_s=reading.median("p95_e2e_s") or 0.0,
        pages=pages,
        room=kv_room(reading, curve.request_tokens, requests_in_flight(reading), pages),
        goodput_qps=reading.median("goodput_qps"),
        joules_per_output_token=joules_per_output_token(reading),
        price=price_per_million(reading, gpu_hour),
    )


def requests_in_flight(reading: Reading) -> float:
    """Return the requests at once of a level: its concurrency, or the most that an open loop had in flight."""
    if reading.measured[0].arrivals is None:
        return reading.at
    return reading.highest("most_in_flight") or 0


def _safe_up_to(chosen: Candidate, candidates: Sequence[Candidate], basis: Basis) -> Reading | None:
    """The last of the unbroken run of levels from the chosen one upwards that meet; at a knee the chosen one itself.

    That a higher level could be the knee, too, is what noise leaves open, and more noise would allow a higher one.
    """
    if basis is Basis.KNEE:
        return chosen.reading
    if basis is not Basis.OBJECTIVES:
        return None
    last = chosen.reading
    for candidate in candidates:
        if candidate.curve is chosen.curve and candidate.reading.at > chosen.reading.at:
            if candidate.standing is not Standing.MEETS:
                break
            last = candidate.reading
    return last


def latency_level(curve: LoadCurve) -> Reading | None:
    """Return the level of a latency-focused service: the lowest that could be the last before latency blows up.

    None where neither a blow-up was found nor its absence within the levels.
    """
    blow_up = curve.blow_up
    return None if blow_up is None or blow_up.seen is None else curve.at(blow_up.last_before[0])


def throughput_level(curve: LoadCurve) -> Reading | None:
    """Return the level of a throughput-focused service: the highest that could be the knee, or the highest level where
    throughput was still rising. None where it is undecided."""
    if curve.knee.verdict is KneeVerdict.UNDECIDED:
        return None
    return curve.at(curve.knee.could_be[-1]) if curve.knee.could_be else curve.levels[-1]
