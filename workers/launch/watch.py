"""The log of a server that is starting: its lines, each with when it was seen, and how long it has been silent."""

from __future__ import annotations

import time
from collections.abc import Callable


class StartLog:
    """Of a server that was launched at that moment (monotonic)."""

    def __init__(self, launched: float, is_waiting: Callable[[str], bool] = lambda _: False) -> None:
        """`is_waiting` tells lines that say only that the server waits: it is as silent as before."""
        self._launched = self._grown = launched
        self._is_waiting = is_waiting
        self._length = 0
        """Of the text at the last look."""
        self._seen = 0
        """What of it was in whole lines."""
        self.lines: list[tuple[float, str]] = []
        """Seconds since the launch, and a whole line."""

    def look(self, text: str) -> None:
        """Take note of what a log, whose whole text is given, has more than at the last look."""
        if len(text) == self._length:
            return
        now, self._length = time.monotonic(), len(text)
        whole, _, half = text[self._seen :].rpartition("\n")
        if whole:
            self.lines += [(now - self._launched, line) for line in whole.split("\n")]
            self._seen += len(whole) + 1
        if any(line and not self._is_waiting(line) for line in (*whole.split("\n"), half)):
            self._grown = now

    @property
    def silent_s(self) -> float:
        """Seconds since the log was last seen to have grown by more than a word that the server waits."""
        return time.monotonic() - self._grown
