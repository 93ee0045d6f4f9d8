"""The warm parent of a node, and servers forked from it: what `warm_parent` is asked, and who owns it.

The owner (one Ray actor a node, see `orchestrator.cluster`) keeps it for a run. Sessions ask it over its socket, which
only this user reaches.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from contract.rows import MUTE_PARENT
from contract.specs import SessionSpec
from workers import processes
from workers.caches import cache_root, compile_caches
from workers.engines.base import Address, Engine, inherited_environment
from workers.launch.workspace import Workspace
from workers.temporary import PREFIX, Owned

SCRIPT = Path(__file__).resolve().with_name("warm_parent.py")
SOCKETS_BELOW = 5
CUDA_DEVICE_ORDER = "PCI_BUS_ID"
"""Of servers, and so of their parent: what it imports may have read it for good."""
IMPORT_LIMIT_S = 300.0
"""For a warm parent to be done importing, from its start."""
FORK_LIMIT_S = 30.0
PID_FILE, DEADLINE_FILE, FORKED_BESIDE = "pid", "deadline", "warm start: forked beside Python threads"
"""As `warm_parent` has them, which must not be imported."""
NO_PARENT = "no warm parent answers: "
POLL_S = 0.2
CLOSE_LIMIT_S = 0.5
"""For a warm parent to end: it is told by the kernel, in the middle of whatever it does in Python. Less than the driver
waits for its owner at the end of a run (`orchestrator.cluster.warm_parents`): one that heeds nothing is killed."""


class NotWarm(Exception):
    """No server can be forked, with the reason: it has to be started cold."""


def parent_for(engine: Engine, spec: SessionSpec, omp_num_threads: str | None) -> WarmParent:
    """Start the parent of servers for `spec`, and for all that are told to see the same environment."""
    return WarmParent(engine.warm_modules, parent_environment(engine, spec, omp_num_threads))


def parent_environment(engine: Engine, spec: SessionSpec, omp_num_threads: str | None) -> dict[str, str]:
    """Return what the parent of servers for `spec` imports in, on this node."""
    environment = inherited_environment(omp_num_threads) | engine.environment(spec, Address())
    environment |= engine.parent_environment() | compile_caches(cache_root())
    environment["CUDA_DEVICE_ORDER"] = CUDA_DEVICE_ORDER
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides all cards from whoever has not asked for any
    return environment


def environment_problem(asked: dict[str, str], imported_in: dict[str, str]) -> str | None:
    """Return in words how the parents of two servers would differ; None where one parent does for both."""
    names = sorted(name for name in asked.keys() | imported_in.keys() if asked.get(name) != imported_in.get(name))
    return f"its environment is not the one that was imported in: {', '.join(names)}" if names else None


class WarmParent:
    """The process that imports and forks. It ends with this object's process, however that ends."""

    def __init__(self, modules: tuple[str, ...], environment: dict[str, str]) -> None:
        """Start importing `modules` in `environment`, which servers forked from it must share.

        Raises RuntimeError, OSError, `psutil.NoSuchProcess` where it ends at once, and leaves nothing.
        """
        self._owned = Owned(f"{PREFIX}warm-", SOCKETS_BELOW)
        self._root = self._owned.path
        self.socket = self._root / "s"
        owner_fd, self._alive = os.pipe()
        try:
            self.pid = self._start(modules, environment, owner_fd)
            self._process = psutil.Process(self.pid)
        except BaseException:
            os.close(self._alive)
            self._owned.remove()
            raise
        finally:
            os.close(owner_fd)

    def _start(self, modules: tuple[str, ...], environment: dict[str, str], owner_fd: int) -> int:
        """Start the script; return the pid that it goes on under."""
        temporary = self._root / "t"
        temporary.mkdir()
        (self._root / DEADLINE_FILE).write_text(str(time.monotonic() + IMPORT_LIMIT_S))
        with socket.socket(socket.AF_UNIX) as listener, (self._root / "log").open("wb") as log:
            listener.bind(str(self.socket))
            listener.listen()
            fds = [owner_fd, listener.fileno()]
            done = subprocess.run(
                [sys.executable, str(SCRIPT), *map(str, fds), str(self._root), *modules],
                env={**environment, "TMPDIR": str(temporary)}, cwd=self._root, pass_fds=fds,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        if done.returncode:
            said = (self._root / "log").read_text(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"the warm parent did not start (exit code {done.returncode}): {said}")
        return int((self._root / PID_FILE).read_text())

    def close(self) -> None:
        """End it. Servers that were forked from it live on: their owners are others. Safe to call twice."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        deadline = time.monotonic() + CLOSE_LIMIT_S
        while processes.is_running(self.pid) and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
        with contextlib.suppress(psutil.NoSuchProcess):
            self._process.kill()  # it is in a library's code, where Python's signal handlers do not run
        self._owned.remove()


@dataclass(frozen=True, slots=True)
class Offer:
    """A warm parent that waits for one request."""

    threads: tuple[str, ...]
    """Of the parent, by name, beside its first: a fork does not have them. They belong to libraries in C that can do
    without (`warm_parent.HARMLESS_THREADS`)."""
    _connection: socket.socket

    def fork(
        self, command: list[str], environment: dict[str, str], workspace: Workspace, grace_s: float, owner_fd: int
    ) -> None:
        """Fork a server, its guard beside it, in place of `command`. Raises `NotWarm`."""
        if command[:2] != [sys.executable, "-m"]:
            raise NotWarm("its command is no Python module")
        request = {
            "module": command[2],
            "arguments": command[3:],
            "environment": environment,
            "directory": str(workspace.root),
            "log": str(workspace.log),
            "status": str(workspace.status),
            "grace_s": grace_s,
        }
        try:
            self._connection.settimeout(FORK_LIMIT_S)
            with contextlib.suppress(BrokenPipeError):  # it says why below, unless it has ended
                text = json.dumps(request).encode()
                sent = socket.send_fds(self._connection, [text], [owner_fd])
                self._connection.sendall(text[sent:])  # the socket may have taken a part
                self._connection.shutdown(socket.SHUT_WR)
            _heard(self._connection)
        except TimeoutError:
            raise NotWarm(f"{MUTE_PARENT}nothing within {FORK_LIMIT_S:g} s") from None
        except OSError as error:
            raise NotWarm(f"{NO_PARENT}{error}") from None

    def close(self) -> None:
        """Let the warm parent go on."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def offer(path: Path, stopping: Callable[[], bool]) -> Offer:
    """Wait until the warm parent at `path` has imported. Raises `NotWarm`, also when `stopping`."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
        imported_by = float(path.with_name(DEADLINE_FILE).read_text())
        deadline = max(imported_by, time.monotonic() + FORK_LIMIT_S)  # it serves one session after another
        connection.settimeout(POLL_S)
        while True:
            last = time.monotonic() > deadline  # before it listens: a session that stood still has its answer by now
            with contextlib.suppress(TimeoutError):
                return Offer(tuple(_heard(connection)["threads"]), connection)
            if stopping():
                raise NotWarm("stopped while the warm parent was importing")
            if last:
                raise NotWarm(f"{MUTE_PARENT}it was still importing, or busy")
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            raise NotWarm(f"{NO_PARENT}{error}") from None
        raise


def _heard(connection: socket.socket) -> dict[str, Any]:
    """What the parent says. Raises `NotWarm` with its refusal, OSError where it says nothing any more."""
    line = b""
    while not line.endswith(b"\n"):
        more = connection.recv(2**16)
        if not more:
            raise ConnectionError("it hung up")
        line += more
    message: dict[str, Any] = json.loads(line.splitlines()[-1])  # a session that stood still may hear two at once
    if "refused" in message:
        raise NotWarm(message["refused"])
    return message
