"""Prints lines from a thread of its own. A reader may stand still (Ctrl-S, a paused `less`) for as long as it likes:
the event loop, on which the leases of all servers hang, never waits for it.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import threading
from collections.abc import Callable
from typing import TextIO

LINES_KEPT = 10_000
"""Of those that nobody has read yet: more than a run of days says."""
LAST_WORDS_S = 10.0
"""In all, for a reader to take what is left at the end; what it takes later is written as long as the program lives."""


class Printer:
    """Takes lines at any time and gives them to `write` in their order, and calls `end` behind the last. One that
    raises `OSError` or `ValueError`, as a pipe or terminal does that has closed, costs its line alone."""

    def __init__(self, write: Callable[[str], object], end: Callable[[], object] = lambda: None) -> None:
        self._write = write
        self._end = end
        self._lines = queue.SimpleQueue[str | None]()
        self._dropped = 0
        self._thread = threading.Thread(target=self._print, name="printer", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Never waits. What has no room is counted, and the count said once there is some."""
        if self._lines.qsize() >= LINES_KEPT:
            self._dropped += 1
            return
        self._say_dropped()
        self._lines.put(line)

    def close(self) -> None:
        """Wait until all is printed and ended, but not for ever. Nothing may be put after it."""
        self._say_dropped()
        self._lines.put(None)
        self._thread.join(LAST_WORDS_S)

    def _say_dropped(self) -> None:
        if self._dropped:
            self._lines.put(_not_printed(self._dropped))
            self._dropped = 0

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._write(line)
        with contextlib.suppress(OSError, ValueError):
            self._end()


def _not_printed(lines: int) -> str:
    return f"{lines} line(s) are not printed here: nobody read for so long"


def to_file(stream: TextIO) -> Callable[[str], None]:
    """Return what writes a line to `stream`.

    Past its buffer, where it is a file: Python ends by flushing that, and could not while a thread stands still in it.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, io.UnsupportedOperation):
        return lambda line: print(line, file=stream, flush=True)
    stream.flush()
    encoding, errors = stream.encoding, stream.errors or "strict"

    def write(line: str) -> None:
        left = f"{line}\n".encode(encoding, errors)
        while left:
            left = left[os.write(descriptor, left) :]

    return write
