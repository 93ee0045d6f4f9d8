"""Which series of two runs are the same measurement: same load, and as much of model and server as can be. Pure.

The engine under `compare` and `drift`. What may differ between a pair is named, never passed over in silence, and so is
what only the first of them measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from analysis.comparing.runs import Run
from analysis.errors import AnalysisError
from analysis.rows.groups import COMMITTED, LEARNED, LOAD, UTILIZATION
from analysis.rows.series import Reading, Series, make_series, outcome
from analysis.rows.tables import RunPoint
from contract.failures import FailureClass as F
from contract.rows import FAILED

Item = TypeVar("Item")

STOOD_BEHIND = (*LEARNED, "device")
"""Columns that say what a run found, not what it was asked to do: card and version. Equal measurements may differ."""
WORKLOAD = ("api", "prompt_tokens", "output_tokens", "prompt_lengths", "output_lengths", "shared_prefix", "arrivals")
"""The load, but for its level. No two series whose loads differ are ever held against each other."""


@dataclass(frozen=True, slots=True)
class Family:
    """Points that are measured alike, and the axis that their series run along."""

    purpose: str
    mode: str | None
    columns: tuple[str, ...]
    axis: str

    def series(self, run: Run) -> list[Series]:
        """Return a run's series of this kind, those without a measurement among them."""
        points = [p for p in run.tables.points if p.purpose == self.purpose and self.mode in (None, p.mode)]
        return make_series(points, self.columns, self.axis, self.purpose)

    @property
    def configuration(self) -> tuple[str, ...]:
        """Columns of model and server, as they were asked for: all of a series agree in them."""
        return tuple(c for c in self.columns if c not in (*STOOD_BEHIND, *WORKLOAD, "simulated"))

    @property
    def load(self) -> tuple[str, ...]:
        """Columns of the load; a simulated one is another."""
        return tuple(c for c in self.columns if c in (*WORKLOAD, "simulated"))


NO_ROW = "no row of it"
NOT_BEGUN = (F.NOT_TRIED, F.STOPPED)
"""Failure classes of a level whose turn never came, or that was given up because the user asked for it."""
CLOSED = (*LOAD, "arrivals")
FAMILIES = (
    Family("kv_scaling", "committed", COMMITTED, "max_model_len"),
    Family("kv_scaling", "utilization", UTILIZATION, "max_model_len"),
    Family("comparison", None, CLOSED, "concurrency"),
    Family("batching", None, CLOSED, "concurrency"),
    Family("concurrency", None, CLOSED, "concurrency"),
    Family("near_full_context", None, CLOSED, "concurrency"),
    Family("envelope", None, CLOSED, "concurrency"),
    Family("rate", None, CLOSED, "request_rate"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The same series in two runs."""

    family: Family
    base: Series
    other: Series

    @property
    def levels(self) -> list[tuple[Reading, Reading]]:
        """The places of the axis that both measured, in order."""
        measured = {reading.at: reading for reading in self.other.measured}
        return [(reading, measured[reading.at]) for reading in self.base.measured if reading.at in measured]

    @property
    def reconfigured(self) -> list[tuple[str, object, object]]:
        """Columns of model and server in which the two differ, with both values."""
        values = ((c, getattr(self.base.sample, c), getattr(self.other.sample, c)) for c in self.family.configuration)
        return [(column, a, b) for column, a, b in values if a != b]


@dataclass(frozen=True, slots=True)
class Missing:
    """A level that the first run measured and the other did not."""

    family: Family
    series: Series
    """The first run's."""
    at: float
    rows: tuple[RunPoint, ...]
    """The other run's of this level: none where it never asked for it, or ended before it came to it."""

    @property
    def failed(self) -> bool:
        """Whether the other run tried it in vain; a level that only its load client limited has not failed."""
        return any(row.status in (FAILED, F.KV_TOO_SMALL) and row.failure_class not in NOT_BEGUN for row in self.rows)

    @property
    def why(self) -> str:
        """What became of it in the other run."""
        return ", ".join(dict.fromkeys(map(outcome, self.rows))) or NO_ROW


@dataclass(frozen=True, slots=True)
class Matched:
    """Two runs, as far as they are the same measurement."""

    pairs: list[Pair]
    """Series with a level in common."""
    missing: list[Missing]


def matched(base: Run, other: Run, same_server: bool) -> Matched:
    """Return the series of `base` that have a counterpart in `other`, and its levels that `other` lacks, in order.

    A counterpart has the same load. The series that is alike in everything comes first, then the only one of the same
    model and server; then, unless `same_server`, the only one that is left on both sides. Of what is left then, a
    series of the same model and server of which the other run measured nothing says what became of its levels.

    Raises:
        AnalysisError: one run is simulated and the other is not, or their workload versions differ.
    """
    _refuse_other_kind(base, other)
    found: list[Pair] = []
    missing: list[Missing] = []
    for family in FAMILIES:
        ours = [series for series in family.series(base) if series.measured]
        both = _counterparts(family, ours, family.series(other), same_server)
        found += [pair for pair in both if pair.levels]
        theirs = {pair.base.name: pair.other for pair in both}
        missing += [level for series in ours for level in _missing(family, series, theirs.get(series.name))]
    return Matched(found, missing)


def _counterparts(family: Family, base: Sequence[Series], other: Sequence[Series], same_server: bool) -> list[Pair]:
    keys = _keys(family, same_server)
    found = list(only_pairs(base, [series for series in other if series.measured], keys))
    names = {series.name for series, _ in found}
    left = [series for series in base if series.name not in names]
    tried = only_pairs(left, [series for series in other if not series.measured], _keys(family, same_server=True))
    return [Pair(family, one, another) for one, another in (*found, *tried)]


def _missing(family: Family, series: Series, other: Series | None) -> Iterator[Missing]:
    theirs = {reading.at: reading for reading in other.readings} if other else {}
    for reading in series.measured:
        tried = theirs.get(reading.at)
        if tried is None or not tried.measured:
            yield Missing(family, series, reading.at, tried.unmeasured if tried else ())


def nothing_in_common(base: Run, other: Run, same_server: bool) -> AnalysisError:
    """Return what is said of two runs that have no pair."""
    return AnalysisError(f"{base.name} and {other.name} have no point in common: {_why_none(base, other, same_server)}")


def _refuse_other_kind(base: Run, other: Run) -> None:
    kinds = [{point.simulated for point in run.tables.points} for run in (base, other)]
    if kinds in ([{True}, {False}], [{False}, {True}]):
        words = ["simulated" if kind == {True} else "measured" for kind in kinds]
        raise AnalysisError(f"{base.name} is {words[0]} and {other.name} is {words[1]}: they cannot be compared")
    versions = base.workload_version, other.workload_version
    if None not in versions and versions[0] != versions[1]:
        raise AnalysisError(
            f"{base.name} has workload version {versions[0]} and {other.name} {versions[1]}: their points were measured"
            " in different ways and cannot be compared"
        )


def _keys(family: Family, same_server: bool) -> list[Callable[[Series], Hashable]]:
    """Return what a counterpart must agree in, the strictest first; memory of another model or server says nothing."""
    same_server = same_server or family.purpose == "kv_scaling"
    everything = (*family.load, *family.configuration, *STOOD_BEHIND)
    asked, load = (*family.load, *family.configuration), family.load
    return [partial(_values, columns=columns) for columns in (everything, asked, *(() if same_server else (load,)))]


def _values(series: Series, columns: Sequence[str]) -> tuple[object, ...]:
    return tuple(getattr(series.sample, column) for column in columns)


def only_pairs(
    base: Sequence[Item], other: Sequence[Item], keys: Sequence[Callable[[Item], Hashable]]
) -> Iterator[tuple[Item, Item]]:
    """Yield pairs of equal key, one key after the other, where each side has only one item left of that key.

    Every item is in one pair at most, and which are paired does not hang on the order of the items.
    """
    left, right = list(base), list(other)
    for key in keys:
        ours, theirs = _by_key(left, key), _by_key(right, key)
        for value in ours:
            if len(ours[value]) == len(theirs.get(value, ())) == 1:
                yield left[ours[value][0]], right[theirs[value][0]]
        done = {v for v in ours if len(ours[v]) == len(theirs.get(v, ())) == 1}
        left = [item for item in left if key(item) not in done]
        right = [item for item in right if key(item) not in done]


def _by_key(items: Sequence[Item], key: Callable[[Item], Hashable]) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = {}
    for number, item in enumerate(items):
        found.setdefault(key(item), []).append(number)
    return found


def _why_none(base: Run, other: Run, same_server: bool) -> str:
    """Return in what no point of one run agrees with any of the other; the first few such columns."""
    asked = [column for family in FAMILIES for column in family.configuration] if same_server else []
    columns = dict.fromkeys(("purpose", *WORKLOAD, *asked, "concurrency", "request_rate"))
    apart = []
    for column in columns:
        ours, theirs = (
            {setting_words(getattr(p, column)) for p in run.tables.points if p.status == "measured"}
            for run in (base, other)
        )
        if ours and theirs and not ours & theirs:
            apart.append(f"{column} {_listed(ours)} against {_listed(theirs)}")
    if not all(any(p.status == "measured" for p in run.tables.points) for run in (base, other)):
        return "one of them holds no measured point"
    if apart:
        return "; ".join(apart[:3])
    return "no combination of " + ("model, server, " if same_server else "") + "load and level is in both just once"


def setting_words(value: object) -> str:
    """Return what a server or a load was told."""
    return "not set" if value is None else str(value)


def _listed(values: set[str]) -> str:
    return ", ".join(sorted(values)[:4]) + (" …" if len(values) > 4 else "")
