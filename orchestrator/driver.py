"""Carries a plan out: the queue over the cluster, one point at a time in each session, every row into the store.

Called by `orchestrator.__main__`. Reduces what there is at the end, also after failures and Ctrl-C.
"""

from __future__ import annotations

import asyncio
import datetime
import signal
from dataclasses import dataclass, field

from contract.failures import FailureClass
from contract.rows import FAILED, MEASURED, SCHEMA_VERSION, Failure, PointRow, SessionEnd, SessionRow
from contract.specs import Point, SessionSpec
from orchestrator.cluster import ActorLost, Cluster, SessionHandle
from orchestrator.fleet import Fleet
from orchestrator.progress import Progress
from orchestrator.scheduler import MAX_ATTEMPTS, Job, Queue
from orchestrator.store import Store


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    measured: int = 0
    failed: list[str] = field(default_factory=list)
    interrupted: bool = False


class Driver:
    """One run over one connected cluster."""

    def __init__(self, cluster: Cluster, fleet: Fleet, store: Store, progress: Progress) -> None:
        self._cluster, self._fleet, self._store, self._progress = cluster, fleet, store, progress
        self._run_id = store.directory.name
        self._live: set[str] = set()
        self._beside: dict[str, set[str]] = {}
        self._sessions: dict[str, SessionSpec] = {}
        self._pending: dict[str, list[Point]] = {}
        self.outcome = Outcome()

    def run(self, sessions: list[SessionSpec]) -> Outcome:
        """Measure all points of `sessions`. Ctrl-C and SIGTERM stop the servers and return what there is."""
        asyncio.run(self._run(sessions))
        return self.outcome

    async def _run(self, sessions: list[SessionSpec]) -> None:
        self._sessions = {session.id: session for session in sessions}
        self._pending = {session.id: list(session.points) for session in sessions}
        jobs = [Job(session.id, max(1, session.gpus), session.estimate_s) for session in sessions]
        queue = Queue({node.id: node.slots for node in self._fleet.nodes})
        task = asyncio.ensure_future(queue.run(jobs, self._execute))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, task)
        try:
            await task
        except asyncio.CancelledError:
            if not self.outcome.interrupted:
                raise
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _interrupt(self, task: asyncio.Future[None]) -> None:
        if self.outcome.interrupted:
            raise KeyboardInterrupt  # the second time: now; guards end the servers
        self.outcome.interrupted = True
        self._progress.say("stopping: no new points; servers are being stopped (again: at once)")
        task.cancel()

    async def _execute(self, job: Job, node: str) -> bool:
        """Run one session on a node. Returns whether it should be tried again elsewhere."""
        spec = self._sessions[job.id]
        pending = self._pending[spec.id]
        self._arrive(spec)
        handle: SessionHandle | None = None
        try:
            handle = await self._cluster.session(spec, node, self._run_id, job.attempt)
            await self._measure_all(spec, handle, pending)
            return False
        except ActorLost as error:
            if job.attempt < MAX_ATTEMPTS:
                self._progress.say(f"lost     {spec.model.name} {spec.id}: {error}; trying again")
                return True
            self._put_lost(spec, job.attempt, pending, Failure(FailureClass.ACTOR_LOST, str(error)))
            return False
        finally:
            if handle is not None:
                await asyncio.shield(self._stop(spec, handle, job.attempt))
            self._live.discard(spec.id)
            self._progress.ended(spec)

    async def _measure_all(self, spec: SessionSpec, handle: SessionHandle, pending: list[Point]) -> None:
        self._progress.doing(spec, "starting")
        started = await handle.start()
        self._progress.ready(spec, started)
        while pending:
            point = pending[0]
            self._progress.doing(spec, f"{point.purpose} {point.concurrency or ''}".rstrip())
            row = await handle.measure(point)
            row.co_running_sessions = sorted(self._beside[spec.id])
            self._beside[spec.id] = self._live - {spec.id}
            self._put(spec, point, row)
            pending.pop(0)

    async def _stop(self, spec: SessionSpec, handle: SessionHandle, attempt: int) -> None:
        self._progress.doing(spec, "stopping")
        try:
            end = await handle.stop()
        except ActorLost as error:
            end = SessionEnd(self._lost_row(spec, attempt, str(error)), "")
        self._store.put_session(end)

    def _arrive(self, spec: SessionSpec) -> None:
        """Every session that lives beside another at any moment of a point is named in that point's row."""
        self._beside[spec.id] = set(self._live)
        for other in self._live:
            self._beside[other].add(spec.id)
        self._live.add(spec.id)

    def _put(self, spec: SessionSpec, point: Point, row: PointRow) -> None:
        self._store.put(row)
        self._progress.measured(spec, row, point.estimate_s)
        if row.status == MEASURED:
            self.outcome.measured += 1
        elif row.status == FAILED:
            self.outcome.failed.append(f"{spec.model.name} {point.purpose} {point.id}: {row.failure_class}")

    def _put_lost(self, spec: SessionSpec, attempt: int, points: list[Point], failure: Failure) -> None:
        for point in points:
            row = PointRow(
                SCHEMA_VERSION, self._run_id, spec.id, point.id, point.sweep, point.kind, point.purpose, attempt,
                FAILED, spec.engine == "sim", _now(), failure.failure_class, failure.message,
                model=spec.model.name, engine=spec.engine, device=spec.device, gpus=spec.gpus, mode=spec.mode,
                max_model_len=spec.server.max_model_len,
            )  # fmt: skip
            self._put(spec, point, row)

    def _lost_row(self, spec: SessionSpec, attempt: int, message: str) -> SessionRow:
        return SessionRow(
            SCHEMA_VERSION, self._run_id, spec.id, attempt, FAILED, spec.engine == "sim", _now(), _now(),
            FailureClass.ACTOR_LOST, message,
        )  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
