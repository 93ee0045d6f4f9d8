"""Whether another fork of a kind is worth a try on a node. Pure; `orchestrator.cluster` shows it each server's row."""

from __future__ import annotations

from dataclasses import dataclass

from contract.rows import MEASURED, SessionRow
from contract.specs import Start

IN_VAIN = 2


@dataclass(slots=True)
class Forks:
    """Of one node, one model, eager or not: what came of the servers of a run that were forked there.

    A good one of another kind says little: some models alone, or a compilation alone, may meet what forking damages.
    """

    good: int = 0
    in_vain: int = 0

    def see(self, row: SessionRow) -> None:
        """Count a server that was ready. What a cold one met as well says nothing of forks."""
        if row.status == MEASURED:
            self.good += row.start == Start.WARM
            self.in_vain += row.fork_came_to_nothing

    @property
    def problem(self) -> str | None:
        """Why the next server should not be forked there, in words; None where it may be."""
        if self.good or self.in_vain < IN_VAIN:
            return None
        return (
            f"on this node {IN_VAIN} forks of this model in this mode (eager or not) have come to nothing where a cold "
            "server was ready, and none has been good"
        )
