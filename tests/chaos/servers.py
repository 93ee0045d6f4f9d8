"""The server of a run that goes on here, from what its guard and its log say: which processes it is, what it is at."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from workers import probe, processes
from workers.launch.workspace import Workspace
from workers.load.endpoint import Endpoint

_ENGINE_CORE = re.compile(r"\(EngineCore\w* pid=(\d+)\)")
"""How vLLM begins the lines of its engine's process."""
_RUNNING = re.compile(r"^vllm:num_requests_running(?:\{.*\})? (\S+)$", re.MULTILINE)
"""Read alone: to parse all of it takes longer, on busy cores, than a short level does."""


@dataclass(frozen=True)
class LiveServer:
    """A server on a Unix socket, in the private directory of its session."""

    workspace: Workspace
    guard: psutil.Process
    front_end: psutil.Process
    """The API server."""

    def engine_core(self) -> psutil.Process | None:
        """Return the process that computes or schedules; None where the log has not named one that is the server's."""
        named = [int(pid) for pid in _ENGINE_CORE.findall(self.workspace.log.read_text(errors="replace"))]
        ours = {each.pid: each for each in self.front_end.children(recursive=True)}
        return next((ours[pid] for pid in reversed(named) if pid in ours), None)

    def requests(self) -> int:
        """Return how many requests it computes now, 0 where it does not say so within a second."""
        try:
            _, text = probe.get(Endpoint("http://localhost", "any", uds=str(self.workspace.socket)), "/metrics", 1.0)
        except probe.NoAnswer:
            return 0
        return int(sum(float(value) for value in _RUNNING.findall(text)))

    def tree(self) -> list[psutil.Process]:
        """Return its guard and all that is below it."""
        return [self.guard, *self.guard.children(recursive=True)]


def live_servers(mark: Path) -> Iterator[LiveServer]:
    """Give the servers of a run on a private Ray whose TMPDIR is `mark`."""
    for path in mark.glob("vc-ray-*/vc-*/status.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            status = json.loads(path.read_text())
            if status["exit_code"] is None and processes.is_running(status["pid"]):
                yield LiveServer(Workspace(path.parent), psutil.Process(status["guard"]), psutil.Process(status["pid"]))
