"""What memory, utilisation and power are read from: one narrow interface over NVML, the host and the simulator.

Used by `workers.session` and by telemetry; implementations never start or stop anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from contract.rows import TelemetryRow


@dataclass(frozen=True, slots=True)
class Card:
    """One physical device. `memory_bytes` is all of it."""

    id: str
    """UUID of the card; `host` for the CPU backend; `SIM-n` for the simulator."""
    name: str
    memory_bytes: int
    power_limit_w: float | None = None

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice of a card (MIG), of which CUDA gives a process one."""
        return self.id.startswith("MIG-")


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process that holds memory of one of our cards."""

    device_id: str
    pid: int
    memory_bytes: int | None
    ours: bool
    """Whether it is in the server's process tree."""

    def __str__(self) -> str:
        used = "unknown memory" if self.memory_bytes is None else f"{self.memory_bytes >> 20} MiB"
        return f"pid {self.pid} on {self.device_id}: {used}"


class CardLost(Exception):
    """A card of the session does not tell its memory, or not any more."""


class Device(Protocol):
    """The cards of one session."""

    cards: list[Card]
    driver_version: str | None
    period_s: float
    """Seconds between two telemetry samples: often enough to see a level, rarely enough not to be seen in it."""

    def memory_by_card(self, pid: int | None) -> list[int]:
        """Return bytes used on each of `cards`. `pid` is the server's: the CPU backend reads its process tree.

        Raises `CardLost`.
        """

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        """Return one telemetry sample a card, with `t_s` 0 (the sampler stamps it); a lost card's has no figure."""

    def processes(self, pid: int | None) -> list[CardProcess]:
        """Return the processes that hold memory of the cards, and whether they are in the tree of `pid`."""

    def close(self) -> None:
        """Let go of the driver's library."""


class LostDevice:
    """Cards that could not be opened: none to list, and every reading of their memory raises `CardLost`."""

    period_s = 1.0

    def __init__(self, why: str) -> None:
        self.cards: list[Card] = []
        self.driver_version: str | None = None
        self._why = why

    def memory_by_card(self, pid: int | None) -> list[int]:
        """Raise `CardLost`."""
        raise CardLost(self._why)

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        """Return nothing."""
        return []

    def processes(self, pid: int | None) -> list[CardProcess]:
        """Return nothing."""
        return []

    def close(self) -> None:
        """Nothing to let go of."""
