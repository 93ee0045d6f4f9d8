"""What a session shows of its server's words, which others read: no secrets, no prompts, no paths; and why it ended.

Used by `workers.session` and `workers.measuring`.
"""

from __future__ import annotations

import os
from pathlib import Path

from contract.rows import Failure
from workers import provenance
from workers.launch import diagnosis
from workers.launch.process import ServerProcess
from workers.provenance import Places
from workers.secrecy import secret_values


class Evidence:
    """Of one session. `process` and `api_key` are those of its server, once there is one."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.process: ServerProcess | None = None
        self.api_key: str | None = None
        self.ready_at = 0
        """Characters of the server's log when that came to listen, or a little before."""
        self.dead = False
        """Whether a point has found the server of no use any more."""
        self._former_log = ""

    def shown(self, text: str) -> str:
        """Return a tail or a message as it may stand in tables and pages; a log's line may stand in it."""
        return provenance.without_prompts(self._masked(text))

    def tail(self) -> str:
        """Return the end of the server's log."""
        return self.shown(self.process.log_tail()) if self.process else ""

    def log(self) -> str:
        """Return the whole log, with that of a fork that came to nothing before it."""
        return self._masked(self._former_log + self.process.log_text()) if self.process else ""

    def set_aside(self, log: Path) -> None:
        """Keep what a fork that came to nothing has written: the log of what comes next is its own."""
        self._former_log = log.read_text(errors="replace")
        log.unlink()

    def death(self, message: str) -> Failure:
        """Return why a server that was ready is of no use any more: the end of its log may tell."""
        self.dead = True
        return diagnosis.of_death(self.process.log_text() if self.process else "", self.ready_at, message)

    def _masked(self, text: str) -> str:
        return provenance.masked(text, self.places, self.api_key, *secret_values(os.environ))
