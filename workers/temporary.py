"""Private directories: short enough for the Unix sockets below them, owned before they are used, removed after a kill.

Who owns one holds a lock that the kernel lets go with the process, however that ends. So what a killed process has left
is known for it, and whoever comes next removes it. One killed before it held the lock leaves an empty directory, which
is known by its age.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from workers import processes
from workers.launch import guard

PREFIX = guard.PREFIX
OWNER = guard.OWNER
UNSEEN = f"{OWNER}.new"
"""The mark until it is locked."""
OWNED_WITHIN_S = 3600.0
"""A directory is owned in milliseconds, and Hydra's empty one lasts seconds; clocks of file servers may differ."""
SHORT = Path("/tmp")
SOCKET_PATH_CHARACTERS = 107
"""What a Unix socket's path may have (unix(7))."""
ENDING_LIMIT_S = 5.0
"""For a guard whose owner was killed to end what it guards and to clean up."""
KILLING_LIMIT_S = 5.0
POLL_S = 0.02
LOOK_S = 0.1


def private_directory(prefix: str, below: int) -> Path:
    """Make a 0700 directory in the user's TMPDIR, or in /tmp where that is too long.

    `below` is how many characters the longest socket's path adds to it.
    """
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    if len(str(directory)) + below <= SOCKET_PATH_CHARACTERS:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=SHORT))


def own(directory: Path) -> int:
    """Mark a directory as this process's: return a descriptor to keep open, which the kernel closes with us.

    Raises OSError, with what to do about it where its file system knows no locks.
    """
    unseen = directory / UNSEEN
    lock = os.open(unseen, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.write(lock, socket.gethostname().encode())
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            words = f"TMPDIR={directory.parent} cannot be locked ({error.strerror}): export TMPDIR={SHORT}"
            raise OSError(error.errno, words) from None
        unseen.rename(directory / OWNER)
    except BaseException:
        os.close(lock)
        raise
    return lock


class Owned:
    """A private directory of this process, until it is removed or the process ends."""

    def __init__(self, prefix: str, below: int) -> None:
        """See `private_directory`. Raises OSError where none can be made or locked."""
        self.path = private_directory(prefix, below)
        try:
            self._lock = own(self.path)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def remove(self) -> None:
        """Remove it and all in it. Safe to call twice."""
        guard.remove_directory(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_ownerless(prefix: str = PREFIX, patience_s: float = 0.0) -> list[Path]:
    """Remove this user's directories of `prefix` on this host whose owner was killed; return them.

    What works in them is ended; a guard that is cleaning up has the time for it, and what it removes is not returned.
    Owners that live have `patience_s` to end.
    """
    began_s = time.monotonic()
    removed = list(_remove_never_owned(prefix))
    while True:
        owned = False
        for directory in _owned_here(prefix):
            with contextlib.suppress(OSError), (directory / OWNER).open("r+") as mark:
                try:
                    fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    owned = True
                    continue
                end_what_works_in(directory, os.fstat(mark.fileno()).st_mtime, ENDING_LIMIT_S)
                if directory.exists():
                    guard.remove_directory(directory)
                    removed.append(directory)
        if not owned or time.monotonic() - began_s > patience_s:
            return removed
        time.sleep(POLL_S)


def _owned_here(prefix: str) -> Iterator[Path]:
    """Give this user's marked directories, but none of another host in a TMPDIR that hosts share: its locks may not be
    seen here."""
    for directory in _ours(prefix):
        with contextlib.suppress(OSError):
            if (directory / OWNER).read_text() == socket.gethostname():
                yield directory


def _remove_never_owned(prefix: str) -> Iterator[Path]:
    """Remove and give what was made long ago by somebody who was killed before it was owned, or as it was removed.

    Nothing else of that name is touched: a directory that holds anything is somebody's.
    """
    for directory in _ours(prefix):
        with contextlib.suppress(OSError):
            unused_s = time.time() - directory.stat().st_mtime
            if unused_s > OWNED_WITHIN_S and {path.name for path in directory.iterdir()} <= {UNSEEN}:
                (directory / UNSEEN).unlink(missing_ok=True)
                directory.rmdir()
                yield directory


def _ours(prefix: str) -> Iterator[Path]:
    """Give the directories of `prefix` that are this user's."""
    for place in {Path(tempfile.gettempdir()), SHORT}:
        for directory in place.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                if not directory.is_symlink() and directory.is_dir() and directory.stat().st_uid == os.getuid():
                    yield directory


def end_what_is_left_in(directory: Path, wait_s: float) -> None:
    """End the processes that work in an owned directory, as `end_what_works_in`. Raises OSError where it is gone."""
    end_what_works_in(directory, (directory / OWNER).stat().st_mtime, wait_s)


def end_what_works_in(directory: Path, began_s: float, wait_s: float = 0.0) -> None:
    """End the processes that work there, after `wait_s` to end by themselves, and remove what they share in memory.

    `began_s` (wall clock) is when the first of them began: what is older in /dev/shm is not theirs.
    """
    asked_s = time.monotonic()
    shared = guard.noted(directory)
    while left := processes.working_in(directory):
        shared |= guard.shared_memory([process.pid for process in left])
        guard.note(directory, shared)
        waited_s = time.monotonic() - asked_s
        if waited_s > wait_s + KILLING_LIMIT_S:
            break
        if waited_s >= wait_s:
            killed = guard.to_kill([process.pid for process in left], waited_s - wait_s)
            for process in left:
                if process.pid not in killed:
                    continue
                with contextlib.suppress(psutil.Error):
                    process.kill()
        time.sleep(LOOK_S)  # a look at all processes, beside what others measure
    guard.remove(shared, began_s)
