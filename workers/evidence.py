"""What a session shows of its server's words: no secrets, no paths and, in what pages quote, no prompts. And its end.

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
    """Of one session, whose servers follow one another: a forked one may come to nothing."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._process: ServerProcess | None = None
        self._keys: list[str] = []
        self.ready_at = 0
        """Characters of the server's log when that came to listen, or a little before."""
        self.dead = False
        """Whether a point has found the server of no use any more."""
        self._former_log = ""

    def hide(self, key: str | None) -> None:
        """Show this key, which a server is about to be given, nowhere from now on."""
        self._keys += [key] if key else []

    def of(self, process: ServerProcess) -> None:
        """Take the words of this server from now on."""
        self._process = process

    def shown(self, text: str) -> str:
        """Return a tail or a message as it may stand in tables and pages; a log's line may stand in it."""
        return provenance.without_prompts(self._masked(text))

    def tail(self) -> str:
        """Return the end of the server's log."""
        return self.shown(self._process.log_tail()) if self._process else ""

    def log(self) -> str:
        """Return the whole log, with that of a fork that came to nothing before it."""
        return self._masked(self._former_log + self._process.log_text()) if self._process else ""

    def set_aside(self, log: Path) -> None:
        """Keep what a fork that came to nothing has written: the log of what comes next is its own."""
        self._former_log = log.read_text(errors="replace")
        log.unlink()

    def death(self, message: str) -> Failure:
        """Return why a server that was ready is of no use any more: the end of its log may tell."""
        self.dead = True
        return diagnosis.of_death(self._process.log_text() if self._process else "", self.ready_at, message)

    def _masked(self, text: str) -> str:
        return provenance.masked(text, self.places, *self._keys, *secret_values(os.environ))
