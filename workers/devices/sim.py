"""The simulator's device: what the stand-in server says it has allocated, read from a file in its private directory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from contract.rows import TelemetryRow
from workers import processes
from workers.devices.base import Card, CardProcess

SIM_CARD_BYTES = 80 * 2**30
"""Memory of a pretended card."""


class SimDevice:
    """Pretended cards. `state` is the file the stand-in server keeps while it lives: bytes and utilisation a card."""

    period_s = 0.1

    def __init__(self, visible: list[str], state: Path) -> None:
        self.cards = [Card(f"SIM-{name}", "simulated GPU", SIM_CARD_BYTES) for name in visible]
        self.driver_version: str | None = None
        self._state = state

    def memory_by_card(self, pid: int | None) -> list[int]:
        """Return what the server says of each card; 0 while no server lives."""
        return [row.memory_used_bytes or 0 for row in self.sample(pid)]

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        """Return one row a card."""
        state: dict[str, Any] = {"memory_used_bytes": 0, "utilization_pct": 0.0}
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(self._state.read_text())
            if processes.is_running(said["pid"]):  # one that was killed leaves its file
                state = said
        return [TelemetryRow(0.0, card.id, state["memory_used_bytes"], state["utilization_pct"]) for card in self.cards]

    def processes(self, pid: int | None) -> list[CardProcess]:
        """Return nothing: nobody else uses a pretended card."""
        return []

    def close(self) -> None:
        """Nothing to let go of."""
