"""Processes read from /proc: descendants, memory, liveness. Linux only; never kills anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from workers.launch import guard

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Work:
    """What a process has done since it began."""

    cpu_s: float = 0.0
    moved_bytes: int = 0
    """Read and written by its calls, and read from storage, where files are mapped; sockets are not in it."""


def tree(pid: int) -> list[int]:
    """Return `pid` and its living descendants."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def is_running(pid: int) -> bool:
    """Return whether `pid` lives; a zombie, which only waits to be reaped, does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def working_in(directory: Path) -> list[psutil.Process]:
    """Return the living processes of this user that work below `directory`, or have their TMPDIR there.

    A process inherits both from whoever started it, so this finds those whose parents are gone. The environment that
    /proc shows of a server forked from a warm parent is the parent's, so where a process works comes first. One that
    works there with a TMPDIR that is none of ours is its user's, who looks at what is left.
    """
    found = []
    for process in psutil.process_iter():
        try:
            works, environment = Path(process.cwd()), process.environ()
            temporary = Path(environment.get("TMPDIR", ""))
            here = temporary.is_relative_to(directory)
            # vLLM's engine core has none: it has given itself a title, which is written over it
            ours = here or not environment or any(part.startswith(guard.PREFIX) for part in temporary.parts)
            inside = (ours and works.is_relative_to(directory)) or (here and not _is_marked(works))
            if inside and process.uids().real == os.getuid() and is_running(process.pid):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _is_marked(directory: Path) -> bool:
    """Whether it lies in a private directory."""
    return any((place / guard.OWNER).exists() for place in (directory, *directory.parents))


def listens(pid: int, port: int) -> bool:
    """Return whether a process in the tree of `pid` listens on a TCP port: the kernel's word, not the port's.

    Source: proc_pid_net(5); state 0A is LISTEN, the tenth column is the socket's inode.
    """
    sockets = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "net" / table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{columns[9]}]")
    return any(opened in sockets for member in tree(pid) for opened in _opened(member)) if sockets else False


def _opened(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for fd in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(fd)  # noqa: PTH115 (`socket:[N]` is no path)


def work(pid: int) -> dict[int, Work]:
    """Return what `pid` and its living descendants have done, by process.

    Source: utime, stime in /proc/PID/stat; rchar, wchar, read_bytes in /proc/PID/io (Linux, proc(5)).
    """
    found = {}
    for member in tree(pid):
        with contextlib.suppress(psutil.Error, OSError):
            times = psutil.Process(member).cpu_times()
            found[member] = Work(times.user + times.system, _moved_bytes(member))
    return found


def _moved_bytes(pid: int) -> int:
    """0 where the kernel does not tell."""
    with contextlib.suppress(OSError):
        fields = dict(line.split(": ") for line in (PROC / str(pid) / "io").read_text().splitlines())
        return sum(int(fields[name]) for name in ("rchar", "wchar", "read_bytes"))
    return 0


def niceness_reset() -> int:
    """Give this process, and so its children, ordinary priority where that is allowed; return the niceness it has.

    Ray starts its workers with a niceness of 15: a server or a client that inherits it yields to anything else on the
    host, and what is measured is not what a user's own server would do.
    """
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    return os.getpriority(os.PRIO_PROCESS, 0)


def pss_bytes(pids: list[int]) -> int:
    """Return the sum of the processes' proportional set sizes: resident memory, shared pages divided among sharers.

    Source: Pss in /proc/PID/smaps_rollup, in KiB (Linux, proc_pid_smaps(5)).
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
                    break
    return total
