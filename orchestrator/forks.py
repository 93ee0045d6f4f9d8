"""Whether a server is to be forked: by its plan and fleet, and by what came of others on its node. Pure.

Plans ask the first; `orchestrator.cluster` asks the second, and shows it each server's row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from contract.rows import MEASURED, SessionRow
from contract.specs import Mode, ModelSpec, PointKind, SessionSpec, Start
from orchestrator.fleet import Fleet
from workers.engines import make_engine

IN_VAIN = 2


AUTO = "auto"
"""`server.start` where it is left open."""


def settled(
    sessions: Mapping[str, SessionSpec], asked: Mapping[str, str], searched: Set[str], fleet: Fleet
) -> dict[str, Start]:
    """Return how each session's server starts: as `asked` for; where that is left open, cold, but for shapes on one
    card of which only memory is measured: of those forks have been shown to be as cold ones are when ready, and not
    under load (docs/warm_starts.md). Of a curve of memory (a model's, in a mode) all servers of a plan start
    alike."""
    alone = {key for key in sessions.keys() - searched if _measures_only_memory(sessions[key])}
    mixed = {_curve(session) for key, session in sessions.items() if key not in alone}
    starts = {key: Start(how) for key, how in asked.items() if how != AUTO}
    for key in sessions.keys() - starts.keys():
        session = sessions[key]
        fit = _was_shown(session) and key in alone and _curve(session) not in mixed
        starts[key] = Start.WARM if fit and planned(Start.WARM, session.engine, fleet) else Start.COLD
    return starts


def _measures_only_memory(session: SessionSpec) -> bool:
    return all(point.kind is PointKind.MEMORY for point in session.points)


def _was_shown(session: SessionSpec) -> bool:
    """Whether forks of such servers have been held against cold ones on cards."""
    return session.device == "cuda" and session.gpus == 1 and session.model.dummy_weights


def _curve(session: SessionSpec) -> tuple[ModelSpec, Mode] | None:
    """Which curve of memory a session is of; None where it measures none."""
    return (session.model, session.mode) if any(p.kind is PointKind.MEMORY for p in session.points) else None


def planned(start: Start, engine: str, fleet: Fleet) -> bool:
    """Whether servers are forked, as far as the fleet tells: none is of an engine without a warm parent, or where every
    node mixes kinds of cards (see `WarmParents.begin`)."""
    engine_forks = bool(make_engine(engine).warm_modules)
    return start is Start.WARM and engine_forks and not all(node.mixes_kinds for node in fleet.nodes)


@dataclass(slots=True)
class Tally:
    """What came of forks."""

    good: int = 0
    in_vain: int = 0

    @property
    def is_against(self) -> bool:
        """Whether enough have come to nothing, and none has been good."""
        return not self.good and self.in_vain >= IN_VAIN


@dataclass(slots=True)
class Forks:
    """Of one node: what came of the servers of a run that were forked there.

    Counted by kind, the model and whether eager: some models alone, or a compilation alone, may meet what forking
    damages, of which a good fork of another kind says little. And of all kinds: where several have come to nothing and
    none is good, it is the node, and each further kind would lose its time to find that out.
    """

    _of_kind: defaultdict[tuple[ModelSpec, bool], Tally] = field(default_factory=lambda: defaultdict(Tally))
    _of_all: Tally = field(default_factory=Tally)

    def see(self, spec: SessionSpec, row: SessionRow) -> None:
        """Count a server that was ready. What a cold one met as well says nothing of forks."""
        if row.status == MEASURED:
            for tally in (self._of_all, self._of_kind[_kind(spec)]):
                tally.good += row.start == Start.WARM
                tally.in_vain += row.fork_came_to_nothing

    def problem(self, spec: SessionSpec) -> str | None:
        """Why a server for `spec` should not be forked there, in words; None where it may be."""
        nothing = "have come to nothing where a cold server was ready, and none has been good"
        if self._of_kind[_kind(spec)].is_against:
            return f"on this node {IN_VAIN} forks of this model in this mode (eager or not) {nothing}"
        if self._of_all.is_against and sum(bool(tally.in_vain) for tally in self._of_kind.values()) > 1:
            return f"on this node {IN_VAIN} forks of several models or modes {nothing}"
        return None


def _kind(spec: SessionSpec) -> tuple[ModelSpec, bool]:
    return spec.model, spec.server.enforce_eager
