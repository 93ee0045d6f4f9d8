"""One driver a run directory at a time: two would measure the same points and write the same files.

Used by `orchestrator.__main__`. The kernel lets go of the lock with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from orchestrator.problems import ConfigError

NAME = ".driver"


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a run directory for as long as the context lasts.

    Raises `ConfigError` where another driver has it, on this host or, on a file system that shares its locks (NFS), on
    any. Where a file system has no locks that is said, and nothing keeps a second driver off.
    """
    path = directory / NAME
    file = _locked(path)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(file)


def _locked(path: Path) -> int | None:
    while True:
        try:
            file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError([f"{path.parent} cannot be written: {error.strerror}"]) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(file, 200, 0).decode(errors="replace").strip() or "another driver"
            os.close(file)
            elsewhere = " on " in who and f" on {socket.gethostname()} " not in who
            gone = f"; where that host is gone for good, remove {path}" if elsewhere else ""
            message = f"{path.parent} is being measured by {who}: wait for its end, or stop it{gone}"
            raise ConfigError([message]) from None
        except OSError as error:
            os.close(file)
            print(f"WARNING  {path.parent} takes no locks ({error.strerror}): nothing keeps a second driver off it")
            return None
        if _is(path, file):
            break
        os.close(file)  # its last holder removed it in between
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode(), 0)
    return file


def _is(path: Path, file: int) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(file))
    return False
