"""Which series of two runs are the same measurement: same load, and as much of model and server as can be. Pure.

The engine under `compare` and `drift`. What may differ between a pair is named, never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from analysis.comparing.runs import Run
from analysis.errors import AnalysisError
from analysis.rows.groups import COMMITTED, LEARNED, LOAD, UTILIZATION
from analysis.rows.series import Reading, Series, make_series

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
        """Return a run's series of this kind."""
        points = [p for p in run.tables.points if p.purpose == self.purpose and self.mode in (None, p.mode)]
        return [s for s in make_series(points, self.columns, self.axis, self.purpose) if s.measured]

    @property
    def configuration(self) -> tuple[str, ...]:
        """Columns of model and server, as they were asked for: all of a series agree in them."""
        return tuple(c for c in self.columns if c not in (*STOOD_BEHIND, *WORKLOAD, "simulated"))

    @property
    def load(self) -> tuple[str, ...]:
        """Columns of the load; a simulated one is another."""
        return tuple(c for c in self.columns if c in (*WORKLOAD, "simulated"))


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


def pairs(base: Run, other: Run, same_server: bool) -> list[Pair]:
    """Return the series of `base` that have a counterpart in `other` and a level in common, in a fixed order.

    A counterpart has the same load. The series that is alike in everything comes first, then the only one of the same
    model and server; then, unless `same_server`, the only one that is left on both sides.

    Raises:
        AnalysisError: there is none, or one run is simulated and the other is not, or their workload versions differ.
    """
    _refuse_other_kind(base, other)
    found = [
        Pair(family, one, another)
        for family in FAMILIES
        for one, another in only_pairs(family.series(base), family.series(other), _keys(family, same_server))
    ]
    found = [pair for pair in found if pair.levels]
    if not found:
        raise AnalysisError(
            f"{base.name} and {other.name} have no point in common: {_why_none(base, other, same_server)}"
        )
    return found


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
