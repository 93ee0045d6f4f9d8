"""Where the processes of one level wait for each other, so that they start together and end together."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from workers.load.failed import LoadLost

GATHER_LIMIT_S = 60.0
HEAD_START_S = 0.05
"""From the last process's arrival to the start, so that all have seen it."""
POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class StartLine:
    """Where the processes of one level wait for each other: files in a directory of theirs alone."""

    directory: str
    parties: int
    index: int

    async def wait(self) -> float:
        """Return the moment that all parties share, on `time.monotonic()`, once it has come.

        A process that wakes up late finds it past: it is the moment from which its window counts all the same.

        Raises:
            LoadLost: one of the parties does not come.
        """
        self.agreed("ready")
        try:
            async with asyncio.timeout(GATHER_LIMIT_S):
                while (start_s := self._start_s()) is None:  # noqa: ASYNC110 - the others are other processes
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            message = f"not all {self.parties} load processes came to the start within {GATHER_LIMIT_S:g} s"
            raise LoadLost(message) from None
        while (early_s := start_s - time.monotonic()) > 0:  # noqa: ASYNC110 - timers wake up early
            await asyncio.sleep(early_s)
        return start_s

    def agreed(self, word: str) -> bool:
        """Say `word` for this process, and return whether all have said it."""
        (Path(self.directory) / f"{word}.{self.index}").touch()
        return len(list(Path(self.directory).glob(f"{word}.*"))) == self.parties

    def _start_s(self) -> float | None:
        """The moment, once it has been set; the first party sets it when all are there."""
        start = Path(self.directory) / "start"
        if start.exists():
            return float(start.read_text())
        if self.index == 0 and self.agreed("ready"):
            written = start.with_suffix(".tmp")
            written.write_text(repr(time.monotonic() + HEAD_START_S))
            written.replace(start)
        return None
