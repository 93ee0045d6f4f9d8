"""The CPU backend's device: memory is the PSS of the server's process tree, utilisation is the host's CPU."""

from __future__ import annotations

import os

import psutil

from contract.rows import TelemetryRow
from workers import processes
from workers.devices.base import Card, CardProcess


class HostDevice:
    """The host as one card. Its memory is RAM; there is no power and no clock to read."""

    period_s = 1.0  # reading a tree's PSS walks its page tables: some 30 ms for 2 GiB

    def __init__(self) -> None:
        self.cards = [Card("host", f"CPU, {os.cpu_count()} cores", psutil.virtual_memory().total)]
        self.driver_version: str | None = None

    def memory_by_card(self, pid: int | None) -> list[int]:
        """Return the PSS in bytes of the tree of `pid`; 0 before it was started and after it has gone."""
        return [processes.pss_bytes(processes.tree(pid)) if pid is not None else 0]

    def sample(self, pid: int | None) -> list[TelemetryRow]:
        """Return memory of the tree; GPU columns stay empty."""
        return [TelemetryRow(0.0, "host", memory_used_bytes=self.memory_by_card(pid)[0])]

    def processes(self, pid: int | None) -> list[CardProcess]:
        """Return nothing: a host always runs other processes."""
        return []

    def close(self) -> None:
        """Nothing to let go of."""
