"""Ends what a killed run leaves in its private directory, and removes that: nobody else would until the next run.

    python -m workers.caretaker OWNER_FD DIRECTORY PATIENCE_S

Started by `orchestrator.cluster` for its private Ray, which dies with the driver, but for workers that were just being
started, and leaves its files. It does nothing where the driver has removed the directory itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from workers import processes
from workers.launch import guard
from workers.temporary import POLL_S, clear

PATIENCE_S = 6.0
"""For what works in the directory to end by itself: guards end their servers, in 3 to 4 s on busy cores."""
CLOSE_LIMIT_S = 30.0


class Caretaker:
    """Of one directory, which is `own`ed. It acts where this object's process dies without having removed it."""

    def __init__(self, directory: Path, patience_s: float = PATIENCE_S) -> None:
        owner_fd, self._alive = os.pipe()
        command = [sys.executable, "-m", "workers.caretaker", str(owner_fd), str(directory), str(patience_s)]
        self._process = subprocess.Popen(
            command, pass_fds=[owner_fd], cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(owner_fd)

    def close(self) -> None:
        """End it: at once where the directory is gone, else when it has removed it."""
        os.close(self._alive)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_LIMIT_S)


def main(owner_fd: int, directory: Path, patience_s: float) -> None:
    """Wait for the owner's end, then see to it that nothing is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the owner answers them, and it ends with the owner
        signal.signal(number, signal.SIG_IGN)
    select.select([owner_fd], [], [])
    deadline, shared = time.monotonic() + patience_s, set[Path]()
    while directory.exists() and (left := processes.working_in(directory)) and time.monotonic() < deadline:
        shared |= guard.shared_memory([process.pid for process in left])
        time.sleep(POLL_S)
    if directory.exists():
        clear(directory, shared)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
