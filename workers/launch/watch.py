"""The log of a server that is starting: its lines, each with when it was seen, and how long it has been silent."""

from __future__ import annotations

import time


class StartLog:
    """Of a server that was launched at that moment (monotonic)."""

    def __init__(self, launched: float) -> None:
        self._launched = self._grown = launched
        self._seen = 0
        self.lines: list[tuple[float, str]] = []
        """Seconds since the launch, and a whole line."""

    def look(self, text: str) -> None:
        """Take note of what a log, whose whole text is given, has more than at the last look."""
        if len(text) > self._seen:
            self._grown = time.monotonic()
        whole, _, _ = text[self._seen :].rpartition("\n")
        if whole:
            self.lines += [(self._grown - self._launched, line) for line in whole.split("\n")]
            self._seen += len(whole) + 1

    @property
    def silent_s(self) -> float:
        """Seconds since the log was last seen to have grown."""
        return time.monotonic() - self._grown
