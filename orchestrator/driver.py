"""Carries a plan out: the queue over the cluster, one point at a time in each session, every row into the store.

Called by `orchestrator.__main__`. Reduces what there is at the end, also after failures and Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from contract.failures import FailureClass
from contract.rows import (
    FAILED,
    MEASURED,
    PRUNED,
    RESULT_STATUSES,
    SCHEMA_VERSION,
    Failure,
    PointRow,
    SessionEnd,
    SessionRow,
)
from contract.specs import Point, SessionSpec
from orchestrator import interrupts
from orchestrator.cluster import ActorLost, Cluster, SessionHandle
from orchestrator.fleet import Fleet
from orchestrator.plan import memory_first
from orchestrator.progress import Progress, title
from orchestrator.scheduler import MAX_ATTEMPTS, Job, Queue
from orchestrator.search import Pruned, Search, next_step
from orchestrator.search.control import Control
from orchestrator.store import Store
from workers import point_rows
from workers.kv_figures import KvFigures

STOP_MARGIN_S = 30.0
SETTLE_LIMIT_S = 120.0
ONE_INTERRUPT_S = 1.0


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    measured: int = 0
    failed: list[str] = field(default_factory=list)
    servers: list[SessionRow] = field(default_factory=list)
    """Of every server that was started, in the order they ended."""
    interrupted: bool = False


class Driver:
    """One run over one connected cluster."""

    def __init__(self, cluster: Cluster, fleet: Fleet, store: Store, progress: Progress) -> None:
        self._cluster, self._fleet, self._store, self._progress = cluster, fleet, store, progress
        self._run_id = store.directory.name
        self._live: dict[str, str] = {}
        self._leaving: dict[str, asyncio.Event] = {}
        """Sessions that measure nothing any more, and what is set once they are gone."""
        self._queue = Queue({node.id: node.slots for node in fleet.nodes})
        self._beside: dict[str, set[str]] = {}
        self._sessions: dict[str, SessionSpec] = {}
        self._pending: dict[str, list[Point]] = {}
        self._searches: Mapping[str, tuple[Search, ...]] = {}
        self._controls: Mapping[str, Control] = {}
        self._rows: dict[str, dict[str, PointRow]] = {}
        """What searches know: rows of this run and of what it goes on with, without what is nested in them."""
        self._interrupted_at = -math.inf
        self.outcome = Outcome()

    def run(
        self,
        sessions: list[SessionSpec],
        searches: Mapping[str, tuple[Search, ...]] | None = None,
        controls: Mapping[str, Control] | None = None,
    ) -> Outcome:
        """Measure all points of `sessions`, those that `searches` (by session) ask for while a server lives, and the
        `controls` of sessions that are the last on their host.

        Ctrl-C and SIGTERM stop the servers and return what there is.
        """
        self._searches, self._controls = searches or {}, controls or {}
        with interrupts.deferred() as early:
            asyncio.run(self._run(sessions, early))
        return self.outcome

    async def _run(self, sessions: list[SessionSpec], early: list[int]) -> None:
        self._sessions = {session.id: session for session in sessions}
        self._pending = {session.id: list(session.points) for session in sessions}
        self._rows = {session.id: self._store.rows(session.id) for session in sessions}
        for session in sessions:
            self._ask(session)
        waiting = [session for session in sessions if self._pending[session.id]]
        jobs = [Job(session.id, max(1, session.gpus), session.estimate_s) for session in waiting]
        task = asyncio.ensure_future(self._queue.run(jobs, self._execute))
        with interrupts.handled_by(asyncio.get_running_loop(), lambda: self._interrupt(task)):
            if early:
                early.clear()
                self._interrupt(task)
            try:
                await task
            except asyncio.CancelledError:
                if not self.outcome.interrupted:
                    raise

    def _interrupt(self, task: asyncio.Future[None]) -> None:
        if time.monotonic() - self._interrupted_at < ONE_INTERRUPT_S:
            return  # `timeout` and terminals deliver one interrupt twice
        if self.outcome.interrupted:
            raise KeyboardInterrupt  # the second time: now; guards end the servers
        self.outcome.interrupted = True
        self._interrupted_at = time.monotonic()
        task.cancel()
        self._progress.say("stopping: no new points; servers are being stopped (again: at once)")

    async def _execute(self, job: Job, node: str) -> bool:
        """Run one session on a node. Returns whether it should be tried again elsewhere; never raises but to stop."""
        spec = self._sessions[job.id]
        self._arrive(spec, node)
        handle: SessionHandle | None = None
        try:
            handle = await self._cluster.session(spec, node, self._run_id, job.attempt)
            await self._measure_all(spec, handle)
        except ActorLost as error:
            if job.attempt < MAX_ATTEMPTS:
                self._progress.say(f"lost     {spec.model.name} {spec.id}: {error}; trying again")
                return True
            self._give_up(spec, job.attempt, Failure(FailureClass.ACTOR_LOST, str(error)))
        except Exception as error:  # a defect of ours in one session must not cost the others their rows
            self._give_up(spec, job.attempt, Failure(FailureClass.INTERNAL, f"{type(error).__name__}: {error}"))
        finally:
            if handle is not None:
                self._leaving.setdefault(spec.id, asyncio.Event())
                stopping = asyncio.ensure_future(self._leave(spec, handle, job.attempt))
                try:
                    await asyncio.shield(stopping)
                except asyncio.CancelledError:
                    await stopping  # an interrupt must not cost the row and the log of a server that is stopping
                    raise
            self._live.pop(spec.id, None)
            self._progress.ended(spec)
        return False

    async def _measure_all(self, spec: SessionSpec, handle: SessionHandle) -> None:
        self._progress.doing(spec, "starting")
        started = await handle.start()
        self._progress.ready(spec, started)
        pending = self._pending[spec.id]
        while pending or await self._ask_control(spec):
            point = pending[0]
            self._progress.doing(spec, f"{point.purpose} {point.concurrency or ''}".rstrip())
            try:
                row = await asyncio.wait_for(handle.measure(point), spec.timeouts.point_s)
            except TimeoutError:
                message = f"{point.purpose} was not measured within {spec.timeouts.point_s:.0f} s"
                self._give_up(spec, started.attempt, Failure(FailureClass.TIMEOUT, message))
                return
            row.co_running_sessions = sorted(self._beside[spec.id])
            self._beside[spec.id] = self._neighbours(spec)
            pending.pop(0)
            self._put(spec, point, row)
            if started.status == MEASURED:
                self._ask(spec)
        self._leaving[spec.id] = asyncio.Event()
        self._progress.doing(spec, "settling its account")
        with contextlib.suppress(TimeoutError, ActorLost):  # every point has its row by now
            await asyncio.wait_for(handle.settle(), SETTLE_LIMIT_S)

    def _ask(self, spec: SessionSpec) -> None:
        """Let the searches of a session add what is next to its pending points, and put the rows of what they prune."""
        step = next_step(self._searches.get(spec.id, ()), self._rows[spec.id])
        pending = self._pending[spec.id]
        known = {point.id for point in pending}
        more = [point for point in (*step.ahead, *step.measure) if point.id not in known]
        ahead = [point for point in step.ahead if point.id not in known]
        pending[:] = memory_first([*ahead, *pending, *(point for point in more if point not in ahead)])
        self._progress.total_points += len(more)
        self._prune(spec, step.pruned)

    async def _ask_control(self, spec: SessionSpec) -> bool:
        """Let the control of a session that has measured all else add a reading, if it is alone on its host and stays
        so: no session waits to be started, and those beside it, if any, are being stopped."""
        control = self._controls.get(spec.id)
        point = control.next(self._rows[spec.id]) if control is not None and self._queue.drained else None
        others = self._neighbours(spec)
        if point is None or not others <= set(self._leaving):
            return False
        if others:
            self._progress.doing(spec, "waiting for its neighbours to be gone")
            await asyncio.gather(*(self._leaving[other].wait() for other in others))
        self._beside[spec.id] = self._neighbours(spec)
        self._pending[spec.id].append(point)
        self._progress.total_points += 1
        return True

    def _prune(self, spec: SessionSpec, pruned: tuple[Pruned, ...]) -> None:
        for each in pruned:
            row = self._unmeasured(spec, each.point, 1, PRUNED, None, each.reason)
            self._store.put(row)
            self._rows[spec.id][row.point_id] = row
        if pruned:
            self._progress.pruned(spec, len(pruned))

    async def _leave(self, spec: SessionSpec, handle: SessionHandle, attempt: int) -> None:
        """Stop a session; after it nothing of it is on its host."""
        await self._stop(spec, handle, attempt)
        self._live.pop(spec.id, None)
        self._leaving.pop(spec.id).set()

    async def _stop(self, spec: SessionSpec, handle: SessionHandle, attempt: int) -> None:
        self._progress.doing(spec, "stopping")
        timeouts = spec.timeouts
        try:
            end = await handle.stop(timeouts.stop_grace_s + timeouts.memory_back_s + STOP_MARGIN_S)
        except ActorLost as error:
            end = SessionEnd(self._lost_row(spec, attempt, FailureClass.ACTOR_LOST, str(error)), "")
        except Exception as error:  # see _execute
            message = f"while stopping: {type(error).__name__}: {error}"
            end = SessionEnd(self._lost_row(spec, attempt, FailureClass.INTERNAL, message), "")
        if end.row.server_pid is not None and end.row.memory_back_s is None:
            self._progress.say(f"WARNING  {title(spec)}: its memory did not come back after the stop")
        self.outcome.servers.append(end.row)
        self._store.put_session(end)

    def _arrive(self, spec: SessionSpec, node: str) -> None:
        """Every session that lives beside another at any moment of a point is named in that point's row."""
        self._live[spec.id] = node
        self._beside[spec.id] = self._neighbours(spec)
        for other in self._beside[spec.id]:
            self._beside[other].add(spec.id)

    def _neighbours(self, spec: SessionSpec) -> set[str]:
        node = self._live[spec.id]
        return {other for other, where in self._live.items() if where == node and other != spec.id}

    def _put(self, spec: SessionSpec, point: Point, row: PointRow) -> None:
        self._store.put(row)
        self._rows[spec.id][row.point_id] = replace(row, requests=[], telemetry=[], server_samples=[])
        self._progress.measured(spec, row, point.estimate_s)
        if row.status == MEASURED:
            self.outcome.measured += 1
        elif row.status not in RESULT_STATUSES:
            self.outcome.failed.append(f"{spec.model.name} {point.purpose} {point.id}: {row.failure_class}")

    def _give_up(self, spec: SessionSpec, attempt: int, failure: Failure) -> None:
        """Put a failure row for every point that has none."""
        pending = self._pending[spec.id]
        while pending:
            point = pending[0]
            row = self._unmeasured(spec, point, attempt, FAILED, failure.failure_class, failure.message)
            pending.pop(0)
            self._put(spec, point, row)

    def _unmeasured(
        self, spec: SessionSpec, point: Point, attempt: int, status: str, failure_class: str | None, message: str
    ) -> PointRow:
        """Return the row of a point that no session measured: its configuration, and why."""
        session = SessionRow(SCHEMA_VERSION, self._run_id, spec.id, attempt, status, spec.engine == "sim", _now())
        origin = point_rows.Origin(spec, session, None, KvFigures(), None)
        row = point_rows.blank(origin, point, time.time())
        return replace(row, status=status, failure_class=failure_class, failure_message=message)

    def _lost_row(self, spec: SessionSpec, attempt: int, failure_class: FailureClass, message: str) -> SessionRow:
        return SessionRow(
            SCHEMA_VERSION, self._run_id, spec.id, attempt, FAILED, spec.engine == "sim", _now(), _now(),
            failure_class, message,
        )  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
