"""Where trials run, and what is left there: one machine with a private Ray for each run, or three nodes that stay."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos import standin
from tests.chaos.hurt import registered
from tests.chaos.schedule import Where
from tests.command_line import ROOT
from tests.ray_hosts import RayHosts, ray_hosts

SITE = Path(__file__).with_name("site")
LEFT_LIMIT_S = 15.0
NODE_LIMIT_S = 60.0
WORKERS = 2
_OURS = ("guard.py", standin.MODULE, "warm_parent.py", standin.CORE, standin.TRACKER)


def variables(faults: Path) -> dict[str, str]:
    """Return what makes the simulator the one that can be hurt."""
    return {"PYTHONPATH": f"{SITE}:{ROOT}", standin.FAULTS: str(faults)}


@dataclass
class ChaosPlace:
    """`mark` is the TMPDIR of the run's processes; `hosts` are the nodes that stay, where there are any."""

    mark: Path
    faults: Path
    hosts: RayHosts | None = None
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def where(self) -> Where:
        """What Ray its runs have."""
        return Where.NODES if self.hosts else Where.PRIVATE

    def orchestrate(self, *arguments: str) -> subprocess.Popen[str]:
        """Start our program."""
        if self.hosts:
            return self.hosts.orchestrate(*arguments, f"cluster.address={self.hosts.address}", TMPDIR=str(self.mark))
        environment = {**os.environ, "TMPDIR": str(self.mark), **variables(self.faults)}
        room = [] if arguments[0].startswith("resume=") else ["cluster.num_gpus=3"]
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "orchestrator", *arguments, *room], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def processes(self) -> Iterator[psutil.Process]:
        """Give all that lives of the runs here, and of the nodes."""
        marks = [str(self.mark), *([str(self.hosts.mark)] if self.hosts else [])]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(process.environ().get("TMPDIR", "").startswith(mark) for mark in marks):
                    yield process

    def is_head(self, process: psutil.Process) -> bool:
        """Whether killing this raylet would end the cluster, not one of its nodes."""
        if not self.hosts:
            return False
        below = {each.pid for worker in self.workers for each in _children(worker.pid)}
        return process.pid not in below

    def ready(self) -> None:
        """Start the nodes that are missing."""
        if not self.hosts:
            return
        for worker in list(self.workers):
            if not any(each.name() == "raylet" for each in _children(worker.pid)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(NODE_LIMIT_S)
                self.workers.remove(worker)
        while len(self.workers) < WORKERS:
            self.workers.append(self.hosts.start_worker(0, 1))

    def left(self, killed: bool = False) -> list[str]:
        """Return what a run that has ended left behind and does not remove in `LEFT_LIMIT_S`.

        Of one that was `killed`, the directories of sessions that no guard minded are for the next run to remove.
        """
        deadline = time.monotonic() + LEFT_LIMIT_S
        while (
            found := [what for what in self._left() if not (killed and _for_the_next_run(what))]
        ) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _left(self) -> list[str]:
        named = [each for role in ("server", "core", "guard") for each in registered(self.faults, role)]
        found = [f"process {each.pid} of a server" for each in named]
        found += [f"temporary file {path}" for path in self.mark.iterdir()]
        for process in self._ours():
            with contextlib.suppress(psutil.Error):
                found.append(f"process {process.pid}: {' '.join(process.cmdline()) or process.name()}")
        if self.hosts:
            found += [f"temporary file {path}" for path in self.hosts.mark.glob("vc-*")]
        found += [f"shared memory {path}" for path in self._shared_memory()]
        return found

    def clear(self) -> None:
        """Forget the servers of the last trial, and end what it has left: the next one is to be judged for itself."""
        for process in list(self._ours()):
            with contextlib.suppress(psutil.Error):
                process.kill()
        left = [*self.mark.iterdir(), *(self.hosts.mark.glob("vc-*") if self.hosts else ())]
        for path in [*left, *self.faults.iterdir(), *self._shared_memory()]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _shared_memory(self) -> list[Path]:
        return list(Path("/dev/shm").glob(f"{standin.shared_memory(self.faults)}*"))

    def _ours(self) -> Iterator[psutil.Process]:
        """Give the processes that a run should not leave: of nodes that stay Ray's own may."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if not self.hosts or any(word in line for word in _OURS) or line.startswith("ray::SessionActor"):
                    yield process


def _for_the_next_run(what: str) -> bool:
    path = re.search(r"temporary file (\S+/vc-(?!ray-)[\w-]+~?)$", what)
    return path is not None and not _minded(Path(path[1]))


def _minded(directory: Path) -> bool:
    """Whether a guard has begun in a session's directory and not yet said how its server ended."""
    try:
        return json.loads((directory / "status.json").read_text())["exit_code"] is None
    except (OSError, ValueError):
        return False


def _children(pid: int) -> list[psutil.Process]:
    try:
        return [each for each in psutil.Process(pid).children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
    except psutil.Error:
        return []


@contextmanager
def chaos_place(where: Where) -> Iterator[ChaosPlace]:
    """Lend a place; nothing of it outlives the block."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background would inherit that it is ignored
    with tempfile.TemporaryDirectory(prefix="vcc-", dir="/tmp") as made:
        mark, faults = Path(made) / "t", Path(made) / "f"
        mark.mkdir()
        faults.mkdir()
        if where is Where.PRIVATE:
            place = ChaosPlace(mark, faults)
            yield place
        else:
            with ray_hosts() as hosts:
                hosts.variables = variables(faults)
                hosts.start_head(gpus=1)
                place = ChaosPlace(mark, faults, hosts)
                yield place
        for process in place.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
