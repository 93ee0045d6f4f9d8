"""Runs a command and sees to it that its whole process tree ends with its owner. Standard library only.

    guard.py OWNER_FD STATUS_FILE GRACE_S PRIVATE_DIR -- COMMAND...

Started by `workers.launch.process`, which keeps the other end of OWNER_FD open for its life; that of a warm start is
forked by `workers.launch.warm_parent`. A byte on OWNER_FD (or SIGTERM) is the owner's request to stop, a second one to
hurry. When the owner dies PRIVATE_DIR is removed too, also where the server had ended by itself before. What the tree
has made in /dev/shm since the guard began, and a killed process could not remove, is removed with it.

It leaves its parent's process group (Ray kills an actor's group and direct children) and becomes a subreaper, so that
no descendant can slip away. Where it is killed itself, the server is, too, and the owner ends what is left. It stays in
the session: Linux schedules each session as a group (autogroup, sched(7)), and
a server in another group could starve its load client. It ends when the tree has ended and its owner knows or is dead.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.05
HURRIED_GRACE_S = 1.0
TRACKER_S = 1.0
TRACKER = b"multiprocessing.resource_tracker"
SHARED_MEMORY = Path("/dev/shm")
SHARED = "shared"
"""The file that says what those who were killed shared in memory."""
PREFIX = "vc-"
"""Of every name that we give a directory in TMPDIR."""
OWNER = "owner"
"""The file by whose lock `workers.temporary` tells whether a directory still has an owner."""
_LIBC = ctypes.CDLL(None)


class Server(Protocol):
    """The guarded process, a child of the guard: a `subprocess.Popen`, or what `warm_parent` has forked."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit code, where it has ended."""


class Guard:
    """This process, from its making on: no longer its parent's, its group's or its terminal's."""

    def __init__(self, owner_fd: int, status_file: Path, grace_s: float, private_dir: Path) -> None:
        self._owner_fd, self._grace_s = owner_fd, grace_s
        self._status_file, self._private_dir = status_file, private_dir
        if os.fork():
            os._exit(0)
        os.setpgid(0, 0)
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._began_s = time.time()
        self._asked: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda received, _frame: self._asked.append(received))

    def is_wanted(self) -> bool:
        """Wait for the owner's word, a byte, that the server is to be started. Without it nothing here is the guard's.

        An owner that has not heard of this guard starts another server in the same directory, and closes the pipe.
        """
        return os.read(self._owner_fd, 1) != b""

    def watch(self, server: Server) -> None:
        """Return when nothing of the server is left, and its owner knows or is dead."""
        _write_status(self._status_file, server.pid, None)
        _wait(self._owner_fd, until=lambda: server.poll() is not None or bool(self._asked))
        self._end_tree(server)
        _write_status(self._status_file, server.pid, server.returncode)
        _wait(self._owner_fd, until=lambda: bool(self._asked))
        if not _owner_lives(self._owner_fd):
            remove_directory(self._private_dir)

    def _end_tree(self, server: Server) -> None:
        """SIGTERM to the server, so that it stops in its own order, to its tree after a second; SIGKILL after grace.

        An owner that dies meanwhile, or hurries, shortens the grace to a second, and so does a server that has ended by
        itself: what it leaves serves nobody.
        """
        asked_at, ended_before = time.monotonic(), server.poll() is not None
        shared = shared_memory(_descendants(os.getpid()))
        note(self._private_dir, shared)
        if server.poll() is None:
            _signal([server.pid], signal.SIGTERM)
        terminated_tree = False
        while True:
            _reap(server)
            left = _descendants(os.getpid())
            if not left:
                remove(shared, self._began_s)
                return
            waited_s = time.monotonic() - asked_at
            shared |= shared_memory(left)  # who has made something since may have ended by the next look
            hurries = ended_before or _hurries(self._owner_fd)
            grace_s = min(HURRIED_GRACE_S, self._grace_s) if hurries else self._grace_s
            if waited_s > grace_s:
                note(self._private_dir, shared)
                _signal(to_kill(left, waited_s - grace_s), signal.SIGKILL)
            elif not terminated_tree and (waited_s > 1.0 or server.returncode is not None):
                _signal(left, signal.SIGTERM)
                terminated_tree = True
            time.sleep(POLL_S)


def main(argv: list[str]) -> None:
    """Guard the command after `--`; returns when nothing of it is left."""
    guard = Guard(int(argv[0]), Path(argv[1]), float(argv[2]), Path(argv[3]))
    command = argv[argv.index("--") + 1 :]
    begin = partial(end_with_parent, os.getpid())
    guard.watch(subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=begin))


def end_with_parent(parent: int) -> None:
    """Have the kernel end this process, a server, with the guard that has started it: it must not run unguarded."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)


def _wait(owner_fd: int, until: Callable[[], bool]) -> None:
    """Wait until `until` holds, or the owner has written (a request to stop) or died. Neither is taken off the pipe."""
    while not until() and not select.select([owner_fd], [], [], POLL_S)[0]:
        pass


def _hurries(owner_fd: int) -> bool:
    """Whether the owner is dead, or has asked twice."""
    written = array.array("i", [0])
    fcntl.ioctl(owner_fd, termios.FIONREAD, written)
    return written[0] > 1 or not _owner_lives(owner_fd)


def _owner_lives(owner_fd: int) -> bool:
    """The pipe's last writer has gone when it hangs up; a byte in it is a request of one that lives, or did."""
    poll = select.poll()
    poll.register(owner_fd, 0)
    return not any(events & select.POLLHUP for _, events in poll.poll(0))


def shared_memory(pids: list[int]) -> set[Path]:
    """Files in /dev/shm that these processes have mapped or open.

    Told by inode: glibc makes a named semaphore under another name, which its maker's mapping shows for ever.
    """
    used: set[tuple[int, int]] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            for line in maps.splitlines():
                if f" {SHARED_MEMORY}/" in line:
                    device, inode = line.split(maxsplit=5)[3:5]
                    major, minor = (int(number, 16) for number in device.split(":"))
                    used.add((os.makedev(major, minor), int(inode)))
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(fd.readlink()).startswith(f"{SHARED_MEMORY}/"):
                        used.add(_inode(fd.stat()))
    found = set()
    with contextlib.suppress(OSError):
        for path in SHARED_MEMORY.iterdir() if used else ():  # names of POSIX shared memory have no further slash
            with contextlib.suppress(OSError):
                if _inode(path.lstat()) in used:
                    found.add(path)
    return found


def _inode(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def to_kill(left: list[int], killing_s: float) -> list[int]:
    """Return whom to kill of those who are left, `killing_s` after the first was.

    Python's resource trackers have a second more: when the others have ended they remove what these had made in
    /dev/shm, of which nobody else may know, and end by themselves.
    """
    others = [pid for pid in left if not _is_tracker(pid)]
    return left if killing_s > TRACKER_S else others


def _is_tracker(pid: int) -> bool:
    try:
        return TRACKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def note(private_dir: Path, shared: set[Path]) -> None:
    """Write down what processes share before they are killed: afterwards nothing tells whose it was."""
    if shared:
        with contextlib.suppress(OSError):
            (private_dir / SHARED).write_text("\n".join(map(str, shared)))


def noted(private_dir: Path) -> set[Path]:
    """Return what somebody wrote down who was killed himself before he had removed it."""
    try:
        return {Path(line) for line in (private_dir / SHARED).read_text().splitlines()}
    except OSError:
        return set()


def remove(files: set[Path], began_s: float) -> None:
    """Remove those that are ours, were made in our time, and that nobody else has mapped."""
    others = shared_memory([int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()])
    for path in files - others:
        with contextlib.suppress(OSError):
            about = path.lstat()
            if about.st_uid == os.getuid() and about.st_ctime >= began_s - 1:
                path.unlink()


def remove_directory(directory: Path) -> None:
    """Remove a directory, by another name first: nobody who knows its path puts anything into it meanwhile.

    The mark of its owner goes last: whoever is killed in the middle leaves what the next one finds.
    """
    gone = directory.with_name(f"{directory.name}~")
    with contextlib.suppress(OSError):
        directory.rename(gone)
        for entry in gone.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != OWNER:
                entry.unlink(missing_ok=True)
    shutil.rmtree(gone, ignore_errors=True)


def _reap(server: Server) -> None:
    server.poll()
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == server.pid:
            server.returncode = os.waitstatus_to_exitcode(status)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, pending = [], [root]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _write_status(path: Path, pid: int, exit_code: int | None) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps({"guard": os.getpid(), "pid": pid, "exit_code": exit_code}))
        temporary.replace(path)
    except OSError:
        return


if __name__ == "__main__":
    main(sys.argv[1:])
