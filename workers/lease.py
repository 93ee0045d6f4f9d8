"""Ends a process that its owner cannot reach any more. On a node that is cut off nobody else would: Ray waits for it.

Held by the actors of `orchestrator.cluster`, whose driver renews it for as long as it wants them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

LEASE_S = 60.0
"""About what Ray takes to give a silent node up; a link that is back before costs nothing."""
RENEWED_EVERY_S = 5.0


class Lease:
    """Counts from its making, and from each renewal."""

    def __init__(self, last_act: Callable[[], object], lease_s: float = LEASE_S) -> None:
        """`last_act` is called in a thread when the lease has run out, before the process ends."""
        self._last_act, self._lease_s = last_act, lease_s
        self._renewed_at = time.monotonic()
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def renew(self) -> None:
        """The owner is there."""
        self._renewed_at = time.monotonic()

    def _watch(self) -> None:
        while (left_s := self._renewed_at + self._lease_s - time.monotonic()) > 0:
            time.sleep(left_s)
        try:
            self._last_act()
        finally:
            os._exit(1)
