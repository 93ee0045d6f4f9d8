"""The simulator as chaos needs it: forkable, with an engine core, and with faults that it takes from a directory."""

import os
import sys
from pathlib import Path
from types import ModuleType

from contract.specs import SessionSpec
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


def install(sim: ModuleType) -> None:
    """Make the engine of `workers.engines.sim` start `tests.chaos.server`."""
    command, environment = sim.SimEngine.command, sim.SimEngine.environment

    def chaos_command(self: object, spec: SessionSpec, model: str, address: Address) -> list[str]:
        return [sys.executable, "-m", MODULE, *command(self, spec, model, address)[2:]]

    def chaos_environment(self: object, spec: SessionSpec, address: Address) -> dict[str, str]:
        return {**environment(self, spec, address), "PYTHONPATH": os.environ["PYTHONPATH"]}

    sim.SimEngine.command, sim.SimEngine.environment = chaos_command, chaos_environment
    sim.SimEngine.warm_modules = (MODULE,)


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
