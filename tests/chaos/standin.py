"""The simulator as chaos needs it: forkable, with an engine core, and with faults that it takes from a directory."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from contract.rows import MEASURED, PointRow
from contract.specs import Point, SessionSpec
from workers.engines.base import Address

MODULE = "tests.chaos.server"
CORE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
TRACKER = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.read()
if os.path.exists(sys.argv[1]):
    os.unlink(sys.argv[1])
"""
"""Removes what the core shares when the core has ended, as Python's resource tracker does: also where all who could say
what it was are killed at once."""
FAULTS = "VCT_FAULTS"
"""Names the directory where faults wait to be taken (files named by their kind) and servers say who they are."""


TOLD = "told"
"""The file there to which processes append what they do to points."""


def hurt_engine(sim: ModuleType) -> None:
    """Make the engine of `workers.engines.sim` start `tests.chaos.server`."""
    command, environment = sim.SimEngine.command, sim.SimEngine.environment

    def chaos_command(self: object, spec: SessionSpec, model: str, address: Address) -> list[str]:
        return [sys.executable, "-m", MODULE, *command(self, spec, model, address)[2:]]

    def chaos_environment(self: object, spec: SessionSpec, address: Address) -> dict[str, str]:
        return {**environment(self, spec, address), "PYTHONPATH": os.environ["PYTHONPATH"]}

    sim.SimEngine.command, sim.SimEngine.environment = chaos_command, chaos_environment
    sim.SimEngine.warm_modules = (MODULE,)


def tell(faults: Path, what: str, session: str, point: str, attempt: int = 0) -> None:
    """Append a line to what the oracle is told: one write, so that lines of several processes never mix."""
    file = os.open(faults / TOLD, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{what} {session} {point} {attempt}\n".encode())
    finally:
        os.close(file)


def tell_of_measuring(session: ModuleType) -> None:
    """Let sessions tell when they begin a point, and when one is measured."""
    measure = session.Session.measure

    def telling(self: Any, point: Point) -> PointRow:
        faults = Path(os.environ[FAULTS])
        tell(faults, "begun", self.spec.id, point.id, self.row.attempt)
        row: PointRow = measure(self, point)
        if row.status == MEASURED:
            tell(faults, "measured", self.spec.id, point.id, row.attempt)
        return row

    session.Session.measure = telling


def tell_of_shards(store: ModuleType) -> None:
    """Let the driver tell when a measured point has its shard."""
    put = store.Store.put

    def telling(self: object, row: PointRow, instead: bool = True) -> None:
        put(self, row, instead)
        if row.status == MEASURED:
            tell(Path(os.environ[FAULTS]), "kept", row.session_id, row.point_id, row.attempt)

    store.Store.put = telling


def take(kind: str) -> bool:
    """Take a fault of this kind, if one waits. Of several that ask, one gets it."""
    try:
        (Path(os.environ[FAULTS]) / kind).unlink()
    except (OSError, KeyError):
        return False
    return True


def shared_memory(faults: Path) -> str:
    """Return how the names of what servers make in /dev/shm begin."""
    return f"{faults.parent.name}."
