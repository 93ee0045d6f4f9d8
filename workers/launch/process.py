"""One server process under its guard: start, look, stop. Blocking calls; knows neither engines nor HTTP.

Used by `workers.session`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from contract.rows import CAME_TO_NOTHING
from workers import processes
from workers.launch import guard
from workers.launch.warm import NotWarm, Offer
from workers.launch.workspace import Workspace
from workers.temporary import end_what_works_in

POLL_S = 0.02
STATUS_LIMIT_S = 30.0
"""For a guard to have started its server."""
BEGIN = b"b"
"""To the guard of a forked server, which does nothing before."""


class ServerProcess:
    """A command running under a guard. The pipe to the guard is this process's promise to be alive."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        workspace: Workspace,
        grace_s: float,
        warm: Offer | None = None,
    ) -> None:
        """Start `command`, or with an offer fork what would run it. Raises `NotWarm` where that is refused or fails."""
        self._workspace = workspace
        self._grace_s = grace_s
        self._began_s = time.time()
        self._asking = threading.Lock()
        workspace.status.unlink(missing_ok=True)  # a former server's
        owner_fd, self._alive = os.pipe()
        try:
            try:
                (warm.fork if warm else _start)(command, environment, workspace, grace_s, owner_fd)
            finally:
                os.close(owner_fd)
            if warm:
                self._ask(BEGIN)
            self.guard_pid, self.pid = self._begun(warm is not None)
        except BaseException:
            os.close(self._alive)
            raise

    def _begun(self, forked: bool) -> tuple[int, int]:
        """Return the pids of guard and server. Where they do not come to life, what there is of them is ended."""
        try:
            return self._wait_for_pids(forked)
        except BaseException:  # the pipe is open yet: a guard whose owner seems dead would remove the directory
            end_what_works_in(self._workspace.root, self._began_s)
            raise

    def _wait_for_pids(self, forked: bool) -> tuple[int, int]:
        deadline = time.monotonic() + STATUS_LIMIT_S
        while time.monotonic() < deadline:
            ended = self._guard_has_ended()  # before the look, for it may end right after it has written
            status = self._status()
            if status:
                return int(status["guard"]), int(status["pid"])
            if ended:
                break
            time.sleep(POLL_S)
        message = f"the guard did not start the server: {self.log_tail()}"
        raise NotWarm(CAME_TO_NOTHING + message) if forked else RuntimeError(message)

    def _guard_has_ended(self) -> bool:
        """The pipe has no reader any more: the guard was the last one."""
        poll = select.poll()
        poll.register(self._alive, 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    def _status(self) -> dict[str, Any]:
        try:
            content = json.loads(self._workspace.status.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def running(self) -> bool:
        """Whether the server's first process lives."""
        return processes.is_running(self.pid)

    @property
    def exit_code(self) -> int | None:
        """The server's exit code once the guard has told it (negative: the signal that ended it)."""
        exit_code: int | None = self._status().get("exit_code")
        return exit_code

    def wait_for_exit_code(self, limit_s: float = 5.0) -> int | None:
        """Return the exit code of a server that has ended, waiting for the guard to tell it."""
        deadline = time.monotonic() + limit_s
        while self.exit_code is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return self.exit_code

    def log_text(self) -> str:
        """Return all that the server has written."""
        try:
            return self._workspace.log.read_text(errors="replace")
        except OSError:
            return ""

    def log_tail(self, lines: int = 40) -> str:
        """Return the last lines that the server has written."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def hurry(self) -> None:
        """Have a stop, this one or the next, give the server a second at the most. Another thread may be in `stop`."""
        with self._asking:
            self._ask(b"qq")

    def stop(self) -> None:
        """End the whole tree and wait for it: SIGTERM, then SIGKILL after the grace. Safe to call twice."""
        if self._alive >= 0:
            self._ask(b"q")
            deadline = time.monotonic() + self._grace_s + 10
            while processes.is_running(self.guard_pid) and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if self.exit_code is None:
                end_what_works_in(self._workspace.root, self._began_s)  # the guard was killed, or hangs
            with self._asking:
                os.close(self._alive)
                self._alive = -1

    def _ask(self, request: bytes) -> None:
        """One byte asks the guard to stop, more to hurry."""
        if self._alive >= 0:
            with contextlib.suppress(BrokenPipeError):  # the guard has already ended with the server
                os.write(self._alive, request)


def _start(
    command: list[str], environment: dict[str, str], workspace: Workspace, grace_s: float, owner_fd: int
) -> None:
    """Start a guard in a process of its own."""
    guarded = [
        sys.executable, "-I", str(Path(guard.__file__).resolve()), str(owner_fd),
        str(workspace.status), str(grace_s), str(workspace.root), "--", *command,
    ]  # fmt: skip
    with workspace.log.open("ab") as log:
        subprocess.run(
            guarded, pass_fds=[owner_fd], env=environment, cwd=workspace.root,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
