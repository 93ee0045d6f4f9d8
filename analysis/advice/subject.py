"""One model on one kind of card: what a run says about its memory and its load, for the pages that join both. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.advice.operating_point import Choice, choices
from analysis.load.load_curve import LoadCurve
from analysis.memory.kv_envelope import Envelope, card_envelope
from analysis.memory.kv_fit import KvResult, kv_results
from analysis.memory.kv_pages import Configs
from analysis.rows.groups import BASE, Group, grouped
from analysis.rows.tables import Tables
from analysis.rows.targets import Slo, Targets

UNKNOWN = "Not known from this run; "


@dataclass(frozen=True, slots=True)
class Subject:
    """One model on one kind of card: what the run says about its memory and its load."""

    group: Group
    choices: tuple[Choice, ...]
    kv: KvResult | None
    envelope: Envelope | None
    """The pool that stands for the card, and what requests take of it."""
    targets: Targets
    configs: Configs
    """Of the models, by session."""

    @property
    def name(self) -> str:
        """Prefix of the names of its own figures."""
        return f"op.{self.group.slug}"

    @property
    def main(self) -> Choice | None:
        """The choice that the questions are about: the first load of a closed loop, else the first of all."""
        return self.choices[0] if self.choices else None

    @property
    def curve(self) -> LoadCurve | None:
        """The curve of its operating point; without one that of the server with the highest tok/s."""
        return None if self.main is None or self.main.open_loop else self.main.curve


def subjects(tables: Tables, slo: Slo, targets: Targets, gpu_hour: float | None) -> list[Subject]:
    """Return what the run says of every model on every kind of card."""
    made, results, found = choices(tables, slo, gpu_hour), kv_results(tables.points), []
    for group in grouped(tables.points, BASE):
        ids = {id(point) for point in group.points}
        own = tuple(choice for choice in made if id(choice.group.points[0]) in ids)
        kv = next((result for result in results if id(result.group.points[0]) in ids), None)
        envelope = card_envelope(kv, tables.points, tables.configs) if kv is not None else None
        found.append(Subject(group, own, kv, envelope, targets, tables.configs))
    return found


def subject_of(result: KvResult, found: Sequence[Subject]) -> Subject:
    """Return the subject that a memory result is of."""
    known = result.group.points[0]
    return next(subject for subject in found if any(point is known for point in subject.group.points))
