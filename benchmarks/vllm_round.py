"""One round of `benchmarks/warm_kills_vllm.py`: a session in a process of its own, the blow, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.killed_session import Answered, Ended, play
from benchmarks.killing import Found, Size, strike
from contract.specs import SessionSpec, Start
from workers import processes
from workers.engines import vllm_phases
from workers.launch import guard
from workers.launch.warm import WarmParent
from workers.launch.workspace import Workspace

BEYOND = 1.2
"""Of a usual start's length: until when somebody may be killed."""
FORK_S = 0.06
"""About what a fork takes, from the session's first word to the server's pid."""
STOPPED_S = 0.3
"""Between SIGSTOP and SIGKILL, where both are sent."""
PATIENCE_S = 1.5
"""For a session to find by itself that somebody was struck, before it is told to stop."""
LIMIT_S = 60.0
"""For a session that is told to stop to have ended: twice what it may wait for an answer of the parent's."""
LEFT_LIMIT_S = 20.0
"""From then on, for everything to be gone."""
READY_TIMES = 10.0
"""Of a usual start's length, for one that nobody disturbs."""
FIRST_READY_LIMIT_S = 300.0
POLL_S = 0.01


@dataclass
class VllmFound(Found):
    """What was seen, of vLLM too."""

    answered: int = 0
    failed: int = 0
    """Starts that nobody disturbed, or only the parent's death after the fork, and that came to nothing."""
    noticed: int = 0
    """Sessions that ended by themselves, as soon as their server was of no use."""
    told: int = 0
    """Sessions that had to be told: whoever was struck lived on or was stopped, or can be done without."""
    ready_s: list[float] = field(default_factory=list)
    """Of starts to nobody."""
    longest_end_s: float = 0.0
    """From the last signal, or from being told to stop, until nothing was left."""
    ports_left: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    """Of the server's start, in which the first signal came."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Of the descendants that were struck."""
    sizes: list[Size] = field(default_factory=list)
    """Of the parent that lives through its rounds, after each."""

    @property
    def bad(self) -> int:
        """Whatever must not be."""
        return super().bad + self.failed + self.ports_left

    @property
    def usual_s(self) -> float:
        """A usual start's length here."""
        return statistics.median(self.ready_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """What chance has picked for one round."""

    victim: str
    moment: float
    """From 0, when a session asks for its server, to 1, `BEYOND` of a usual start's length."""
    ways: tuple[signal.Signals, ...]
    which: float
    """Of the descendants there are then, from 0 to 1."""
    in_fork: bool = False
    """The moment is one of the fork's, which is short."""


class Round:
    """One session, and what happens to it."""

    def __init__(self, plan: Plan, spec: SessionSpec, parent: WarmParent, place: Path, found: VllmFound) -> None:
        """Start its process. All of the round makes its temporary files in `place`, where only the parent has some."""
        self._plan, self._parent, self._place, self._found = plan, parent, place, found
        self._kept = {parent.socket.parent}
        self._shared_before = set(guard.SHARED_MEMORY.iterdir())
        self._line, theirs = multiprocessing.Pipe()
        spawning = multiprocessing.get_context("spawn")  # it has nothing of ours open but its end of the pipe
        self._owner = spawning.Process(target=play, args=(spec, parent.socket, theirs))
        self._owner.start()
        theirs.close()
        self._root: Path | None = None
        self._answered: Answered | None = None
        self._ended: Ended | None = None
        self._family: set[int] = {self._owner.pid or 0}
        self._ports: set[int] = set()

    def play(self) -> None:
        """Live through it, and count."""
        self._found.rounds += 1
        self._found.victims[self._plan.victim] += 1
        try:
            self._wait(lambda: self._root is not None, LIMIT_S)
            if self._plan.victim == "nobody":
                self._wait(lambda: self._answered is not None, self._ready_limit_s)
            else:
                self._strike()
            last_s = time.monotonic()
            if self._plan.victim == "parent":  # the server lives on, and answers
                self._wait(lambda: self._answered is not None, self._ready_limit_s)
                last_s = time.monotonic()
            elif self._plan.victim != "nobody":
                self._wait(lambda: False, PATIENCE_S)
            self._judge(over=self._listen())
            self._end()
            self._count_what_is_left()
            self._found.longest_end_s = max(self._found.longest_end_s, time.monotonic() - last_s)
        except KeyboardInterrupt:
            self._give_up()
            self._wait_until_gone()
            raise
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Have the session's process end: one that has lost its starter stops."""
        self._line.close()
        self._owner.join(LIMIT_S)
        self._owner.kill()
        self._owner.join()

    # --- the session ---

    @property
    def _ready_limit_s(self) -> float:
        return READY_TIMES * self._found.usual_s if self._found.ready_s else FIRST_READY_LIMIT_S

    def _listen(self) -> bool:
        """Take in what the session has said. Returns whether it is over."""
        lives = self._owner.is_alive()  # before the look, for it may end right after its last word
        try:
            while self._line.poll():
                told = self._line.recv()
                if isinstance(told, Path):
                    self._root = told
                elif isinstance(told, Answered):
                    self._answered = told
                elif isinstance(told, Ended):
                    self._ended = told
        except (EOFError, ConnectionError):
            return True
        return self._ended is not None or not lives

    def _wait(self, until: Callable[[], bool], limit_s: float) -> None:
        """Wait until that holds or the session is over, at most so long."""
        deadline = time.monotonic() + limit_s
        while not (self._listen() or until()) and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _judge(self, over: bool) -> None:
        """Count what has become of the session so far."""
        plan, found = self._plan, self._found
        if self._answered is not None:
            found.answered += 1
            if plan.victim == "nobody":
                found.ready_s.append(self._answered.ready_s)
        if over and plan.victim != "owner":
            found.noticed += 1
        elif plan.victim not in ("owner", "nobody", "parent"):
            found.told += 1
        went_on_cold = plan.victim == "parent" and self._ended is not None and self._ended.went_on_cold
        found.cold += went_on_cold
        undisturbed = plan.victim in ("nobody", "parent") and not went_on_cold
        if undisturbed and (self._answered is None or self._answered.start != Start.WARM):
            found.failed += 1
            print(f"round {found.rounds} ({plan.victim}): came to nothing: {self._ended}", flush=True)

    def _end(self) -> None:
        """Tell the session to stop, where it lives; see that it does."""
        if self._owner.is_alive():
            self._remember()
            with contextlib.suppress(OSError):
                self._line.send(None)
        self._wait(lambda: False, LIMIT_S)
        self._owner.join(LEFT_LIMIT_S if self._listen() else 0)
        if self._owner.is_alive():
            self._found.hung += 1
            print(f"round {self._found.rounds}: hung: {self._plan}", flush=True)

    # --- the blow ---

    def _strike(self) -> None:
        """Send the signals when the moment has come and the victim is there."""
        plan, found = self._plan, self._found
        moment = time.monotonic() + plan.moment * (FORK_S if plan.in_fork else BEYOND * found.usual_s)
        self._wait(lambda: time.monotonic() >= moment and self._victim() is not None, LIMIT_S)
        pid = self._victim()
        if pid is None:
            return
        if plan.victim != "parent":  # a look takes longer than a fork, and what was forked is there later
            self._remember()
        found.phases[self._phase()] += 1
        if plan.victim == "descendant":
            found.kinds[_kind(pid)] += 1
        first, *more = plan.ways
        strike(pid, first, plan.victim, found)
        for number in more:
            time.sleep(STOPPED_S)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _victim(self) -> int | None:
        """Whom the signals go to; None while there is none."""
        victim = self._plan.victim
        if victim == "parent":
            return self._parent.pid
        begun = self._begun()
        if begun is None or victim == "owner":
            return None if begun is None else self._owner.pid
        its_guard, server = begun
        if victim == "descendant":
            there = processes.tree(server)[1:]
            return there[int(self._plan.which * len(there))] if there else None
        return server if victim == "server" else its_guard

    def _begun(self) -> tuple[int, int] | None:
        """The pids of guard and server, once the guard has told them."""
        if self._root is None:
            return None
        try:
            status = json.loads(Workspace(self._root).status.read_text())
        except OSError:
            return None
        return status["guard"], status["pid"]

    def _phase(self) -> str:
        if self._answered is not None:
            return "answering"
        try:
            log = Workspace(self._root).log.read_text(errors="replace") if self._root is not None else ""
        except OSError:
            log = ""
        return vllm_phases.reached([(0.0, line) for line in log.splitlines()])

    # --- what is left ---

    def _remember(self) -> None:
        """Note who belongs to the round now, and on which ports they listen."""
        begun = self._begun()
        if begun is None:
            return
        self._family |= {*begun, *processes.tree(begun[0]), *processes.tree(begun[1])}
        self._ports |= _listening(self._family)

    def _count_what_is_left(self) -> None:
        left = self._wait_until_gone()
        pids, directories, shared, ports = left
        found = self._found
        found.processes_left += len(pids)
        found.directories += len(directories)
        found.shared_memory_left += len(shared)
        found.ports_left += len(ports)
        if any(left):
            print(f"round {found.rounds}: left {left} of {self._plan}", flush=True)

    def _wait_until_gone(self) -> tuple[set[int], set[Path], set[Path], set[int]]:
        """Return what is left, at the limit at the latest."""
        deadline = time.monotonic() + LEFT_LIMIT_S
        while any(left := self._left()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return left

    def _left(self) -> tuple[set[int], set[Path], set[Path], set[int]]:
        """Processes, directories, files in /dev/shm that nobody uses, and ports."""
        mine = {self._parent.pid}
        inside = {each.pid for each in processes.working_in(self._place)}
        pids = ({pid for pid in self._family if processes.is_running(pid)} | inside) - mine
        directories = set(self._place.iterdir()) - self._kept
        shared = set(guard.SHARED_MEMORY.iterdir()) - self._shared_before
        if shared:
            shared = {path for path in shared if path.exists() and path.stat().st_uid == os.getuid()}
            shared -= guard.shared_memory(psutil.pids())
        return pids, directories, shared, self._ports & _listening() if self._ports else set()


def _listening(pids: set[int] | None = None) -> set[int]:
    """TCP ports on which these processes listen, or anybody."""
    every = psutil.net_connections("tcp")
    listens = [each for each in every if each.status == psutil.CONN_LISTEN]
    return {each.laddr.port for each in listens if pids is None or each.pid in pids}


KINDS = {"resource_tracker": "resource tracker", "Worker": "worker", "spawn_main": "worker", "EngineCore": "engine"}
"""By what stands in their command lines; a fork that has given itself no title yet has the warm parent's."""


def _kind(pid: int) -> str:
    """What a descendant of a server is."""
    with contextlib.suppress(psutil.Error):
        line = " ".join(psutil.Process(pid).cmdline())
        return next((kind for part, kind in KINDS.items() if part in line), "fork without a title")
    return "gone"
