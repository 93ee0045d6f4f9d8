"""A server that is starting: the lines of its log, each with when it was seen, how long it has been silent, and, where
that says nothing, whether its processes work."""

from __future__ import annotations

import time
from collections.abc import Callable

from workers.processes import Work

LOOK_EVERY_S = 10.0
"""At the work of a server's processes: what looks is on its cores."""
WORK_CPU_SHARE, WORK_BYTES = 0.05, 2**20
"""Of a core, and read or written, by all of them between two looks: either is work. Less is what processes do that
wait, and wake up now and then."""


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


class TreeWork:
    """Whether a server's processes work; `read` returns what each has done so far."""

    def __init__(self, read: Callable[[], dict[int, Work]]) -> None:
        self._read = read
        self._before: dict[int, Work] | None = None
        self._looked = self._worked = 0.0
        self.moves = False
        """Whether they read or wrote between the last two looks: one that only computes may hang in a loop."""

    def still_s(self) -> float:
        """Look, where it is time to; return the seconds since they were last seen to have worked, or seen at all."""
        now = time.monotonic()
        if self._before is None or now - self._looked >= LOOK_EVERY_S:
            done = self._read()
            if self._before is None:
                self._worked = now
            else:
                cpu_s, moved_bytes = _gained(self._before, done)
                self.moves = moved_bytes >= WORK_BYTES
                if self.moves or cpu_s >= WORK_CPU_SHARE * (now - self._looked):
                    self._worked = now
            self._before, self._looked = done, now
        return now - self._worked


def _gained(before: dict[int, Work], done: dict[int, Work]) -> tuple[float, int]:
    pairs = [(before.get(pid, Work()), now) for pid, now in done.items()]
    cpu_s = sum(max(now.cpu_s - then.cpu_s, 0.0) for then, now in pairs)
    moved_bytes = sum(max(now.moved_bytes - then.moved_bytes, 0) for then, now in pairs)
    return cpu_s, moved_bytes
