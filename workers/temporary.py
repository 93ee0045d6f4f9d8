"""Private temporary directories with paths short enough for the Unix sockets that are made below them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from workers import processes
from workers.launch import guard

END_LIMIT_S = 20.0
"""For processes to end that were killed."""
POLL_S = 0.1
OWNER = "owner"
SOCKET_PATH_CHARACTERS = 107
"""What a Unix socket's path may have (unix(7))."""


def private_directory(prefix: str, below: int) -> Path:
    """Make a 0700 directory in the user's TMPDIR, or in /tmp where that is too long.

    `below` is how many characters the longest socket's path adds to it.
    """
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    if len(str(directory)) + below <= SOCKET_PATH_CHARACTERS:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))


def own(directory: Path) -> int:
    """Mark a directory as this process's: return a descriptor to keep open, which the kernel closes with us."""
    unseen = directory / f"{OWNER}.new"  # until it is locked
    lock = os.open(unseen, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unseen.rename(directory / OWNER)
    return lock


def remove_ownerless(prefix: str) -> list[Path]:
    """Remove this user's directories of `prefix` whose owner was killed, end what still works in them; return them."""
    removed = []
    for directory in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            if directory.is_symlink() or directory.stat().st_uid != os.getuid():
                continue
            lock = os.open(directory / OWNER, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held: its owner lives
                clear(directory, set())
                removed.append(directory)
            finally:
                os.close(lock)
    return removed


def clear(directory: Path, shared: set[Path]) -> None:
    """End what still works in a directory that was `own`ed, and remove what there is of it.

    What those processes have in /dev/shm is removed with it, and what of `shared` is there, unless it is older than the
    directory or somebody else has it mapped.
    """
    owner = directory / OWNER
    began_s = owner.stat().st_mtime if owner.exists() else time.time()
    deadline = time.monotonic() + END_LIMIT_S
    while (left := processes.working_in(directory)) and time.monotonic() < deadline:
        shared = shared | guard.shared_memory([process.pid for process in left])
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(POLL_S)
    guard.remove(shared, began_s)
    shutil.rmtree(directory, ignore_errors=True)
