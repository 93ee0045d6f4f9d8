"""The queue: longest first, backfill, retry elsewhere. Pure asyncio over whatever `execute` does; knows no Ray.

Used by `orchestrator.driver`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from contract.causes import Again

KEPT_BACK_S = 300.0
"""After so long cards whose failure may pass are tried again: somebody's process on them may have ended."""


@dataclass(frozen=True, slots=True)
class Job:
    """`slots` GPUs of one node for about `estimate_s` seconds."""

    id: str
    slots: int
    estimate_s: float
    rank: int = 0
    """Jobs of a lower rank start first, whatever their size."""
    attempt: int = 1
    avoid: frozenset[str] = frozenset()
    """Nodes where it failed for a reason of theirs."""
    compiles: str | None = None
    """The key under which its server keeps what it compiles on its node; None: it compiles nothing."""


@dataclass(slots=True)
class _Running:
    job: Job
    node: str
    ends_at: float
    starting: bool = True
    card_failed: bool = False


@dataclass(frozen=True, slots=True)
class _Kept:
    """Slots whose cards failed their job, which no other shall get."""

    node: str
    slots: int
    since: float
    lasts: bool
    let_go: Callable[[], None]


Execute = Callable[[Job, str], Awaitable[Again]]
"""Runs a job on a node; returns whether and where it should be tried again."""


@dataclass(slots=True)
class Queue:
    """Jobs over nodes with so many free slots each."""

    free: dict[str, int]
    _capacity: dict[str, int] = field(init=False)
    _waiting: list[Job] = field(default_factory=list)
    _running: dict[asyncio.Task[Again], _Running] = field(default_factory=dict)
    _kept_back: list[_Kept] = field(default_factory=list)
    _woken: asyncio.Future[None] | None = None
    """Done when a server has become ready: a job may have waited for it."""

    def __post_init__(self) -> None:
        self._capacity = dict(self.free)

    @property
    def drained(self) -> bool:
        """Whether no job waits to be started."""
        return not self._waiting

    async def run(self, jobs: list[Job], execute: Execute) -> list[Job]:
        """Run all jobs and return those that no node has room for. Cancelling it cancels those that run and waits."""
        self._waiting = ordered(jobs)
        try:
            while True:
                self._start_what_fits(execute)
                if not self._running and self._waiting and self._kept_back:
                    self._let_go(lambda kept: True)  # else what waits would fit nowhere
                    continue
                if not self._running:
                    return self._waiting
                self._woken = asyncio.get_running_loop().create_future()
                events: list[asyncio.Future[Any]] = [*self._running, self._woken]
                await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in self._running if task.done()]:
                    self._finish(task)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            self._let_go(lambda kept: True)

    def lose(self, node: str) -> None:
        """Place nothing on a node any more."""
        self.free.pop(node, None)
        self._capacity.pop(node, None)
        self._let_go(lambda kept: kept.node == node)

    def ready(self, job_id: str) -> None:
        """A job's server is up, or will not be: what it has compiled, others of its key find now."""
        for running in self._running.values():
            if running.job.id == job_id:
                running.starting = False
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def keep_back(self, job_id: str, let_go: Callable[[], None], lasts: bool = False) -> bool:
        """Keep the slots of a job that runs from others: its cards are of no use. Returns whether they are.

        They are not where no node would have room left for the job: those that are kept and may be of use again are
        tried again then. `let_go` is called when they are no longer kept, before any job gets them: after
        `KEPT_BACK_S`, but for those whose failure `lasts`, or when what waits would fit nowhere, or at the end.
        """
        ended = next(running for running in self._running.values() if running.job.id == job_id)
        node, slots = ended.node, ended.job.slots
        if not any(self._of_use(other) - (slots if other == node else 0) >= slots for other in self._capacity):
            self._let_go(lambda kept: not kept.lasts)
            return False
        self._kept_back.append(_Kept(node, slots, time.monotonic(), lasts, let_go))
        ended.card_failed = True
        return True

    def _of_use(self, node: str) -> int:
        """The slots of a node that are not kept back."""
        return self._capacity[node] - sum(kept.slots for kept in self._kept_back if kept.node == node)

    def _let_go(self, which: Callable[[_Kept], bool]) -> None:
        gone = [kept for kept in self._kept_back if which(kept)]
        self._kept_back = [kept for kept in self._kept_back if not which(kept)]
        for kept in gone:
            if kept.node in self.free:
                self.free[kept.node] += kept.slots
            kept.let_go()

    def _start_what_fits(self, execute: Execute) -> None:
        for job, node in place(self._waiting, self.free, self._ends(), time.monotonic(), self._compiling()):
            self._waiting.remove(job)
            self.free[node] -= job.slots
            task = asyncio.ensure_future(execute(job, node))
            self._running[task] = _Running(job, node, time.monotonic() + job.estimate_s)

    def _ends(self) -> list[tuple[float, str, int]]:
        return [(r.ends_at, r.node, r.job.slots) for r in self._running.values()]

    def _compiling(self) -> set[tuple[str, str]]:
        return {(r.node, r.job.compiles) for r in self._running.values() if r.starting and r.job.compiles}

    def _finish(self, task: asyncio.Task[Again]) -> None:
        ended = self._running.pop(task)
        again = task.result()
        if ended.node in self.free and not ended.card_failed:
            self.free[ended.node] += ended.job.slots
            before = time.monotonic() - KEPT_BACK_S
            self._let_go(lambda kept: not kept.lasts and kept.since < before)
        if again is not Again.NEVER:
            avoid = ended.job.avoid | (frozenset() if again is Again.FRESH_SERVER else {ended.node})
            first = len(self._waiting) if again is Again.OTHER_CARD else 0
            self._waiting.insert(first, replace(ended.job, attempt=ended.job.attempt + 1, avoid=avoid))
        self._waiting = [replace(job, avoid=self._avoidable(job)) for job in self._waiting]

    def _avoidable(self, job: Job) -> frozenset[str]:
        """Nothing, for a job that failed wherever it fits: any node may try again."""
        fits = {node for node in self._capacity if self._of_use(node) >= job.slots}
        return job.avoid if fits - job.avoid else frozenset()


def ordered(jobs: list[Job]) -> list[Job]:
    """Return jobs as they are started: by rank, of one rank those of most slots first, then the longest (list
    scheduling, Graham 1969)."""
    return sorted(jobs, key=lambda job: (job.rank, -job.slots, -job.estimate_s))


def place(
    waiting: list[Job],
    free: Mapping[str, int],
    ends: list[tuple[float, str, int]],
    now: float,
    compiling: Collection[tuple[str, str]] = (),
) -> list[tuple[Job, str]]:
    """Return which waiting jobs start now, and where.

    The first job that does not fit reserves the node where it will fit soonest; a later job may use that node only if
    it ends before (EASY backfilling, Lifka 1995). `ends` are (time, node, slots) of running jobs.

    `compiling` are (node, key) of what starting servers compile there. A job of such a key waits until they are ready,
    and finds it then, rather than compile it beside them; others may take the room that it would have had.
    """
    left, taken = dict(free), set(compiling)
    placed: list[tuple[Job, str]] = []
    reserved: tuple[str, float] | None = None
    for job in waiting:
        roomy = [
            node
            for node, slots in left.items()
            if slots >= job.slots
            and node not in job.avoid
            and not (reserved and node == reserved[0] and now + job.estimate_s > reserved[1])
        ]
        nodes = [node for node in roomy if job.compiles is None or (node, job.compiles) not in taken]
        if nodes:
            node = min(nodes, key=lambda name: left[name])  # the tightest fit keeps room for larger ones
            left[node] -= job.slots
            placed.append((job, node))
            if job.compiles is not None:
                taken.add((node, job.compiles))
        elif not roomy and reserved is None:
            running = ends + [(now + other.estimate_s, node, other.slots) for other, node in placed]
            reserved = _soonest(job, left, running)
    return placed


def _soonest(job: Job, left: Mapping[str, int], ends: list[tuple[float, str, int]]) -> tuple[str, float] | None:
    """The node and time at which running jobs will have made room for `job`; None where no node ever has it."""
    candidates = []
    for node, slots in left.items():
        if node in job.avoid:
            continue
        for at, where, freed in sorted(ends):
            if where == node:
                slots += freed
                if slots >= job.slots:
                    candidates.append((at, node))
                    break
    if not candidates:
        return None
    at, node = min(candidates)
    return node, at


def placed_first(jobs: list[Job], free: Mapping[str, int]) -> dict[str, str]:
    """Return the nodes of the jobs that start at once, by id."""
    return {job.id: node for job, node in place(ordered(jobs), free, [], 0.0)}


def makespan_s(jobs: list[Job], free: Mapping[str, int]) -> float:
    """Return the seconds that the queue would take if every estimate were true.

    Waits for what another server compiles are not in it.
    """
    starts = start_times(jobs, free)
    return max((starts[job.id] + job.estimate_s for job in jobs), default=0.0)


def start_times(jobs: list[Job], free: Mapping[str, int]) -> dict[str, float]:
    """Return when each job would start (seconds), as `makespan_s` has it."""
    starts: dict[str, float] = {}
    now, left, running = 0.0, dict(free), list[tuple[float, str, int]]()
    waiting = [replace(job, compiles=None) for job in ordered(jobs)]
    while waiting:
        for job, node in place(waiting, left, running, now):
            waiting.remove(job)
            starts[job.id] = now
            left[node] -= job.slots
            running.append((now + job.estimate_s, node, job.slots))
        if not running:
            raise ValueError(f"no node has room for {waiting[0]}")
        running.sort()
        now, node, slots = running.pop(0)
        left[node] += slots
    return starts
