"""What rounds of kills have seen, the blow, and how large a warm parent is. Used by `benchmarks/warm_kills*.py`."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from workers import processes

GROWTH_LIMIT_BYTES = 2**20
"""Of a warm parent's resident memory over a run of rounds. In 200 that of a stand-in gained 44 KiB, vLLM's nothing."""


@dataclass
class Found:
    """What was seen of some rounds."""

    rounds: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    """Who was drawn."""
    struck: Counter[str] = field(default_factory=Counter)
    """To whom a signal went that lived; what a server has started is one process."""
    cold: int = 0
    """Started cold, for the warm parent had died before it could answer."""
    hung: int = 0
    """Servers whose guard could not say how they ended, and sessions that did not end. Where guard or session was to
    die, nobody could tell of a server: what hangs there is among the processes left."""
    processes_left: int = 0
    directories: int = 0
    """Left behind, or removed under a session that was still there."""
    shared_memory_left: int = 0
    descriptors_gained: int = 0
    resident_gained_bytes: int = 0

    @property
    def bad(self) -> int:
        """Whatever must not be."""
        return self.hung + self.processes_left + self.directories + self.shared_memory_left

    @property
    def grew(self) -> bool:
        """Whether the parent that lived through the rounds has more than noise explains."""
        return self.descriptors_gained > 0 or self.resident_gained_bytes > GROWTH_LIMIT_BYTES


@dataclass(frozen=True, slots=True)
class Size:
    """Of one process."""

    descriptors: int
    resident_bytes: int
    proportional_bytes: int
    """Pages that others have too count as a part (`workers.processes.pss_bytes`)."""

    @classmethod
    def of(cls, pid: int) -> Size:
        """Read it now."""
        process = Path(f"/proc/{pid}")
        resident = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmRSS"))
        descriptors = len(list((process / "fd").iterdir()))
        return cls(descriptors, int(resident.split()[1]) * 1024, processes.pss_bytes([pid]))


def strike(pid: int, number: int, victim: str, found: Found) -> None:
    """Send a signal to the victim, and count it where that lived."""
    if processes.is_running(pid):
        os.kill(pid, number)
        found.struck[victim] += 1
