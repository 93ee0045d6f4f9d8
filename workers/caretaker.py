"""Ends what a killed run leaves in its private directory, and removes that: nobody else would until the next run.

    python -m workers.caretaker OWNER_FD DIRECTORY WAIT_S

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
from pathlib import Path

from workers.temporary import ENDING_LIMIT_S, end_what_is_left_in, remove_ownerless

CLOSE_LIMIT_S = 30.0


class Caretaker:
    """Of one directory that this process owns. It acts where the process dies without having removed it."""

    def __init__(self, directory: Path, wait_s: float = ENDING_LIMIT_S) -> None:
        """`wait_s` is what guards and others have to end by themselves."""
        owner_fd, self._alive = os.pipe()
        command = [sys.executable, "-m", "workers.caretaker", str(owner_fd), str(directory), str(wait_s)]
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


def main(owner_fd: int, directory: Path, wait_s: float) -> None:
    """Wait for the owner's end, then see to it that nothing is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the owner answers them, and it ends with the owner
        signal.signal(number, signal.SIG_IGN)
    select.select([owner_fd], [], [])
    with contextlib.suppress(FileNotFoundError):  # the owner has removed it, or was about to
        # without its lock: a next run, which takes that, would not wait for us and meet what still lives
        end_what_is_left_in(directory, wait_s)
    remove_ownerless(directory.name)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
