"""Carries a plan out: the queue over the cluster, one point at a time in each session, every row into the store.

Called by `orchestrator.__main__`. Reduces what there is at the end, also after failures and Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from contract.causes import POINT_TRIES, SESSION_STARTS, Again, Cause, Reach, cause
from contract.failures import FailureClass
from contract.rows import (
    FAILED,
    MEASURED,
    MEMORY_LEFT_BYTES,
    OVER_BUDGET,
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
from orchestrator.budget import Budget, Spending, by_use, jobs
from orchestrator.cluster import ActorLost, Cluster, NoCards, SessionHandle
from orchestrator.fleet import Fleet
from orchestrator.plan import memory_first
from orchestrator.progress import Progress, title
from orchestrator.scheduler import Job, Queue
from orchestrator.search import Pruned, Search, next_step
from orchestrator.search.control import Control
from orchestrator.store import NotWritten, Store, rebuild
from workers import point_rows
from workers.kv_figures import KvFigures

STOP_MARGIN_S = 30.0
SETTLE_LIMIT_S = 120.0
ONE_INTERRUPT_S = 1.0
POINT_ESTIMATES = 3.0
"""So many times its estimate a point may take, where that is more than `Timeouts.point_s`."""


@dataclass(slots=True)
class Outcome:
    """How a run ended."""

    measured: int = 0
    failed: list[str] = field(default_factory=list)
    servers: list[SessionRow] = field(default_factory=list)
    """Of every server that was started, in the order they ended."""
    interrupted: bool = False
    left_out: int = 0
    """Points that the budget had no room for."""
    not_written: str | None = None
    """Why the run directory took no more files, which ended the run."""


class Driver:
    """One run over one connected cluster."""

    def __init__(
        self, cluster: Cluster, fleet: Fleet, store: Store, progress: Progress, budget: Budget | None = None
    ) -> None:
        self._cluster, self._fleet, self._store, self._progress = cluster, fleet, store, progress
        self._run_id = store.directory.name
        self._live: dict[str, str] = {}
        self._leaving: dict[str, asyncio.Event] = {}
        """Sessions that measure nothing any more, and what is set once they are gone."""
        self._beside: dict[str, set[str]] = {}
        self._sessions: dict[str, SessionSpec] = {}
        self._pending: dict[str, list[Point]] = {}
        self._searches: Mapping[str, tuple[Search, ...]] = {}
        self._controls: Mapping[str, Control] = {}
        self._rows: dict[str, dict[str, PointRow]] = {}
        """What searches know: rows of this run and of what it goes on with, without what is nested in them."""
        self._queue = Queue({node.id: node.slots for node in fleet.nodes})
        self._spending = Spending(budget or Budget())
        self._attempts: dict[str, int] = {}
        """The start of each session that counts: rows of another are late ones of an actor that was given up."""
        self._earlier: dict[str, int] = {}
        """Starts that each session had before this run was gone on with."""
        self._not_counted: Counter[str] = Counter()
        """Starts of each session that got no cards while others of the run had theirs on that node."""
        self._started: dict[str, SessionRow] = {}
        """What a session's actor said of its server in the start that counts."""
        self._writing = asyncio.Lock()
        self._tries: Counter[str] = Counter()
        self._own: dict[str, PointRow] = {}
        """What the last try of a point that is to be tried again came to."""
        self._handles: dict[str, SessionHandle] = {}
        self._interrupted_at: dict[int, float] = {}
        """When each signal came first."""
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
        if self._spending.budget.limits:
            sessions = [by_use(session) for session in sessions]
        self._sessions = {session.id: session for session in sessions}
        self._pending = {session.id: list(session.points) for session in sessions}
        self._rows = {session.id: self._store.rows(session.id) for session in sessions}
        starts = self._store.starts()
        for session in sessions:
            attempts = [row.attempt for row in self._rows[session.id].values() if row.status == MEASURED]
            self._earlier[session.id] = max(starts.get(session.id, 0), *attempts, 0)
        self._attempts = {session: earlier + 1 for session, earlier in self._earlier.items()}
        task = asyncio.ensure_future(self._work(sessions))
        with interrupts.handled_by(asyncio.get_running_loop(), lambda number: self._interrupt(task, number)):
            if early:
                number = early[0]
                early.clear()
                self._interrupt(task, number)
            try:
                await task
            except NotWritten:
                pass  # it is in the outcome
            except asyncio.CancelledError:
                if not self.outcome.interrupted:
                    raise

    async def _work(self, sessions: list[SessionSpec]) -> None:
        for session in sessions:
            await self._ask(session)
        waiting = [session for session in sessions if self._pending[session.id]]
        for job in await self._queue.run(jobs(waiting, self._spending.budget), self._execute):
            failure = Failure(FailureClass.NODE_LOST, "no node is left that has room for it")
            await self._give_up(self._sessions[job.id], failure)

    def _interrupt(self, task: asyncio.Future[None], number: int) -> None:
        """Stop: with SIGTERM in two seconds, for `ray job stop` kills after three; else each server in its own time."""
        now = time.monotonic()
        if now - self._interrupted_at.get(number, -math.inf) < ONE_INTERRUPT_S:
            return  # `timeout` and terminals deliver one interrupt twice
        if self.outcome.interrupted:
            raise interrupts.Interrupted  # the second time: now; guards end the servers
        self.outcome.interrupted = True
        self._interrupted_at[number] = now
        if number == signal.SIGTERM:
            for handle in self._handles.values():
                handle.hurry()
            self._progress.say(f"stopping at once; what was measured is kept: {rebuild(self._store)}")
        else:
            self._progress.say("stopping: no new points; servers are being stopped (again: at once)")
        task.cancel()

    async def _execute(self, job: Job, node: str) -> Again:
        """Run one session on a node. Returns where it should be tried again; never raises but to end the run."""
        spec = self._sessions[job.id]
        attempt = self._attempts[spec.id] = self._earlier[spec.id] + job.attempt
        self._started.pop(spec.id, None)
        if not await self._leave_out_what_has_no_room(spec):
            return Again.NEVER
        self._spending.begins(spec)
        self._arrive(spec, node)
        handle: SessionHandle | None = None
        failure: Failure | None = None
        waits = False
        try:
            handle = await self._cluster.session(spec, node, self._run_id, attempt, self._starts(spec) > 1)
            self._handles[spec.id] = handle
            failure = await self._measure_all(spec, handle, node)
        except ActorLost as error:
            failure = await self._lost(error, node)
            waits = isinstance(error, NoCards) and self._have_cards_beside(spec)
        except NotWritten:
            raise
        except Exception as error:  # a defect of ours in one session must not cost the others their rows
            failure = Failure(FailureClass.INTERNAL, f"{type(error).__name__}: {error}")
        finally:
            if handle is not None:
                self._leaving.setdefault(spec.id, asyncio.Event())
                keep_cards = self._keeps_cards(spec, handle, failure)
                try:
                    await _whole(self._leave(spec, handle, keep_cards))  # or an interrupt would cost its row and log
                finally:
                    del self._handles[spec.id]
            self._spending.ends(spec, had_cards=handle is not None)
            self._live.pop(spec.id, None)
            self._progress.ended(spec)
        if waits and failure is not None and failure.failure_class == FailureClass.ACTOR_LOST:
            return self._wait_for_cards(spec)
        return await self._after(spec, node, failure)

    def _keeps_cards(self, spec: SessionSpec, handle: SessionHandle, failure: Failure | None) -> bool:
        """Whether the actor of a server whose cards failed it stays: while it lives, nobody gets its cards."""
        if failure is None or (what := cause(failure.failure_class)).again is not Again.OTHER_CARD:
            return False
        return self._queue.keep_back(spec.id, handle.kill, what.card_is_lost)

    def _wait_for_cards(self, spec: SessionSpec) -> Again:
        """Have a session wait, behind the others, for cards that another job holds: it is not its start that failed."""
        if not self._not_counted[spec.id]:
            self._progress.say(f"waits    {title(spec)}: another job holds GPUs of its node")
        self._not_counted[spec.id] += 1
        return Again.OTHER_CARD

    async def _lost(self, error: ActorLost, node: str) -> Failure:
        lost = FailureClass.NODE_LOST if await self._cluster.has_lost(node) else FailureClass.ACTOR_LOST
        return Failure(lost, str(error))

    async def _after(self, spec: SessionSpec, node: str, failure: Failure | None) -> Again:
        """Return where a session goes on that was ended by `failure`. Where it does not, its points get their rows."""
        if failure is None:
            return Again.NEVER
        what = cause(failure.failure_class)
        if what.reach is Reach.NODE:
            self._queue.lose(node)
            self._progress.say(f"lost     node {node}: nothing is placed there any more")
        if not self._pending[spec.id]:
            return Again.NEVER
        if self._starts_again(spec, what):
            self._progress.say(f"again    {title(spec)}: {failure.failure_class}: {failure.message}")
            return Again.FRESH_SERVER if what.again is Again.NEVER else what.again
        await self._give_up(spec, failure, self._not_tried(spec, failure))
        return Again.NEVER

    def _not_tried(self, spec: SessionSpec, failure: Failure) -> Failure:
        """Return what `failure` is to points whose turn had not come: the same only where no server was ready."""
        started = self._started.get(spec.id)
        if started is None or started.status != MEASURED:
            return failure
        starts = self._starts(spec)
        servers = "its server" if starts == 1 else f"{starts} starts of its server"
        why = f"{servers} ended before its turn came, the last with {failure.failure_class}: {failure.message}"
        return Failure(FailureClass.NOT_TRIED, why)

    def _starts_again(self, spec: SessionSpec, what: Cause) -> bool:
        """Whether a session gets a fresh server: because the failure may pass, or for its other points."""
        goes_on = what.again is not Again.NEVER or what.reach is Reach.SERVER
        return goes_on and self._starts(spec) < SESSION_STARTS

    def _starts(self, spec: SessionSpec) -> int:
        return self._attempts[spec.id] - self._earlier[spec.id] - self._not_counted[spec.id]

    def _have_cards_beside(self, spec: SessionSpec) -> bool:
        """Whether other sessions live on its node: once they end, theirs are to be had."""
        return any(other in self._handles for other in self._neighbours(spec))

    async def _measure_all(self, spec: SessionSpec, handle: SessionHandle, node: str) -> Failure | None:
        """Measure what is pending on one server. Returns what ended it before it was through."""
        self._progress.doing(spec, "starting")
        started = self._started[spec.id] = await handle.start()
        self._queue.ready(spec.id)
        self._progress.ready(spec, started)
        # what its numbers are measured with must not be lost with this process; its stop replaces the row
        await self._keep(partial(self._store.put_session, SessionEnd(started, "")))
        if started.status != MEASURED and self._starts_again(spec, cause(started.failure_class)):
            return _failure_of(started)
        pending = self._pending[spec.id]
        while await self._leave_out_what_has_no_room(spec) or (
            await self._ask_control(spec) and await self._leave_out_what_has_no_room(spec)
        ):
            point = pending[0]
            began = time.monotonic()
            self._spending.measures(spec, point)
            self._progress.doing(spec, f"{point.purpose} {point.concurrency or ''}".rstrip())
            self._tries[point.id] += 1
            self._own.pop(point.id, None)
            measuring = asyncio.ensure_future(handle.measure(point))
            stopped: asyncio.CancelledError | None = None
            try:
                await asyncio.wait({measuring}, timeout=_limit_s(spec, point))
            except asyncio.CancelledError as error:
                if not measuring.done():
                    measuring.cancel()
                    raise
                stopped = error  # what has ended is a shard, also where a stop comes at the same moment
            took_s = time.monotonic() - began
            row = await self._row_of(spec, point, measuring, node)
            row.co_running_sessions = sorted(self._beside[spec.id])
            self._beside[spec.id] = self._neighbours(spec)
            what = None if row.status in RESULT_STATUSES else cause(row.failure_class)
            if what and started.status == MEASURED and self._tried_again(spec, point, what):
                self._own[point.id] = row
                self._progress.say(
                    f"again    {title(spec)}: {point.purpose}: {row.failure_class}: {row.failure_message}"
                )
            else:
                await self._put(spec, point, row)
                pending.remove(point)
                if row.status == MEASURED:
                    self._spending.measured(point, took_s)
                if started.status == MEASURED:
                    await self._ask(spec)
            if stopped:
                raise stopped
            if what and what.reach in (Reach.SERVER, Reach.NODE):
                return Failure(row.failure_class or "", row.failure_message or "")
        self._leaving[spec.id] = asyncio.Event()
        self._progress.doing(spec, "settling its account")
        with contextlib.suppress(TimeoutError, ActorLost):  # every point has its row by now
            async with asyncio.timeout(SETTLE_LIMIT_S):
                await handle.settle()
        return None if started.status == MEASURED else _failure_of(started)

    async def _leave_out_what_has_no_room(self, spec: SessionSpec) -> bool:
        """Put a row for each pending point that the budget does not hold, up to one that it does: is there one?

        One that an earlier start has left stays: why the point failed says more.
        """
        pending = self._pending[spec.id]
        while pending and (why := self._spending.over(spec, pending[0])):
            point = pending[0]
            row = self._unmeasured(spec, point, OVER_BUDGET, None, why)
            await self._keep(partial(self._store.put, row, instead=False))
            pending.pop(0)
            self._rows[spec.id][row.point_id] = row
            self._progress.left_out(spec, point, why)
            self.outcome.left_out += 1
        return bool(pending)

    async def _row_of(
        self, spec: SessionSpec, point: Point, measuring: asyncio.Future[PointRow], node: str
    ) -> PointRow:
        """Return what came of a point, also where nothing came."""
        if not measuring.done():
            measuring.cancel()
            limit = f"{point.purpose} was not measured within {_limit_s(spec, point):.0f} s"
            return self._failed(spec, point, Failure(FailureClass.POINT_TIMEOUT, limit))
        try:
            row = measuring.result()
        except ActorLost as error:
            return self._failed(spec, point, await self._lost(error, node))
        if row.attempt != self._attempts[spec.id]:
            late = f"a row of attempt {row.attempt} came in attempt {self._attempts[spec.id]}: it does not count"
            return self._failed(spec, point, Failure(FailureClass.ACTOR_LOST, late))
        return row

    def _tried_again(self, spec: SessionSpec, point: Point, what: Cause) -> bool:
        """Move a point behind the others if it is to be tried once more."""
        last_start = what.again is not Again.SAME_SERVER and self._starts(spec) >= SESSION_STARTS
        if what.again is Again.NEVER or last_start or self._tries[point.id] >= POINT_TRIES:
            return False
        pending = self._pending[spec.id]
        pending[:] = memory_first([*(other for other in pending if other is not point), point])
        return True

    async def _ask(self, spec: SessionSpec) -> None:
        """Let the searches of a session add what is next to its pending points, and put the rows of what they prune."""
        step = next_step(self._searches.get(spec.id, ()), self._rows[spec.id])
        pending = self._pending[spec.id]
        known = {point.id for point in pending}
        more = [point for point in (*step.ahead, *step.measure) if point.id not in known]
        ahead = [point for point in step.ahead if point.id not in known]
        pending[:] = memory_first([*ahead, *pending, *(point for point in more if point not in ahead)])
        self._progress.total_points += len(more)
        await self._prune(spec, step.pruned)

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
            if not self._queue.drained or self._neighbours(spec):  # one of them is to start again
                return False
        self._beside[spec.id] = self._neighbours(spec)
        self._pending[spec.id].append(point)
        self._progress.total_points += 1
        return True

    async def _prune(self, spec: SessionSpec, pruned: tuple[Pruned, ...]) -> None:
        for each in pruned:
            row = self._unmeasured(spec, each.point, PRUNED, None, each.reason)
            await self._keep(partial(self._store.put, row))
            self._rows[spec.id][row.point_id] = row
        if pruned:
            self._progress.pruned(spec, len(pruned))

    async def _leave(self, spec: SessionSpec, handle: SessionHandle, keep_cards: bool) -> None:
        """Stop a session; after it nothing of it is on its host, but with `keep_cards` its actor."""
        await self._stop(spec, handle, keep_cards)
        self._live.pop(spec.id, None)
        self._leaving.pop(spec.id).set()

    async def _stop(self, spec: SessionSpec, handle: SessionHandle, keep_cards: bool) -> None:
        self._progress.doing(spec, "stopping")
        timeouts = spec.timeouts
        try:
            end = await handle.stop(timeouts.stop_grace_s + timeouts.memory_back_s + STOP_MARGIN_S, keep_cards)
        except ActorLost as error:
            end = SessionEnd(self._lost_row(spec, FailureClass.ACTOR_LOST, str(error)), "")
        except Exception as error:  # see _execute
            message = f"while stopping: {type(error).__name__}: {error}"
            end = SessionEnd(self._lost_row(spec, FailureClass.INTERNAL, message), "")
        if end.row.server_pid is not None and end.row.memory_back_s is None:
            self._progress.say(_left_behind(title(spec), end.row))
        self.outcome.servers.append(end.row)
        # of an actor that was lost before it had said anything of its server, an earlier start's row says more
        await self._keep(partial(self._store.put_session, end, instead=spec.id in self._started or bool(end.log)))

    def _arrive(self, spec: SessionSpec, node: str) -> None:
        """Every session that lives beside another at any moment of a point is named in that point's row."""
        self._live[spec.id] = node
        self._beside[spec.id] = self._neighbours(spec)
        for other in self._beside[spec.id]:
            self._beside[other].add(spec.id)

    def _neighbours(self, spec: SessionSpec) -> set[str]:
        node = self._live[spec.id]
        return {other for other, where in self._live.items() if where == node and other != spec.id}

    async def _put(self, spec: SessionSpec, point: Point, row: PointRow) -> None:
        try:
            await self._keep(partial(self._store.put, row))
        except NotWritten:
            raise
        except Exception as error:  # a row that makes no shard: see _execute
            message = f"its row could not be written: {type(error).__name__}: {error}"
            row = self._failed(spec, point, Failure(FailureClass.INTERNAL, message))
            await self._keep(partial(self._store.put, row))
        self._rows[spec.id][row.point_id] = replace(row, requests=[], telemetry=[], server_samples=[])
        self._progress.measured(spec, row, point.estimate_s)
        if row.status == MEASURED:
            self.outcome.measured += 1
        elif row.status not in RESULT_STATUSES:
            self.outcome.failed.append(f"{spec.model.name} {point.purpose} {point.id}: {row.failure_class}")

    async def _keep(self, put: Callable[[], None]) -> None:
        """Write to the run directory, also where a stop comes in the middle of it.

        Never on the loop: actors' leases hang on that, and a shared file system may stall for longer than they last.
        """
        await _whole(self._written(put))

    async def _written(self, put: Callable[[], None]) -> None:
        async with self._writing:  # in order, and with a single thread that a file system can hold up
            try:
                await asyncio.to_thread(put)
            except NotWritten as error:
                self.outcome.not_written = str(error)
                raise

    async def _give_up(self, spec: SessionSpec, failure: Failure, of_others: Failure | None = None) -> None:
        """Put a failure row for every point that has none: its own, or `of_others` for one that was not tried."""
        pending = self._pending[spec.id]
        while pending:
            point = pending[0]
            why = failure if of_others is None or self._tries[point.id] else of_others
            await self._put(spec, point, self._own.get(point.id) or self._failed(spec, point, why))
            pending.pop(0)

    def _failed(self, spec: SessionSpec, point: Point, failure: Failure) -> PointRow:
        return self._unmeasured(spec, point, FAILED, failure.failure_class, failure.message)

    def _unmeasured(
        self, spec: SessionSpec, point: Point, status: str, failure_class: str | None, message: str
    ) -> PointRow:
        """Return the row of a point that no session measured: its configuration, and why."""
        attempt = self._attempts[spec.id]
        now = time.time()
        at = point_rows.utc(now)
        session = SessionRow(SCHEMA_VERSION, self._run_id, spec.id, attempt, status, spec.engine == "sim", at)
        origin = point_rows.Origin(spec, session, None, KvFigures(), None)
        row = point_rows.blank(origin, point, now)
        return replace(row, status=status, failure_class=failure_class, failure_message=message)

    def _lost_row(self, spec: SessionSpec, failure_class: FailureClass, message: str) -> SessionRow:
        """Return the row of a session whose actor has not given it: what it said as it started, and why it is lost."""
        attempt, now = self._attempts[spec.id], point_rows.utc(time.time())
        known = self._started.get(spec.id) or SessionRow(
            SCHEMA_VERSION, self._run_id, spec.id, attempt, MEASURED, spec.engine == "sim", now
        )
        if known.status != MEASURED:  # why it did not start says more
            return replace(known, ended_at=now)
        return replace(known, status=FAILED, ended_at=now, failure_class=failure_class, failure_message=message)


def _failure_of(row: SessionRow) -> Failure:
    return Failure(row.failure_class or "", row.failure_message or "")


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """Carry `work` out also where a stop comes in the middle of it; the stop goes on after it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


def _limit_s(spec: SessionSpec, point: Point) -> float:
    """Return the seconds after which a point is given up: a level may be planned to be long."""
    return max(spec.timeouts.point_s, POINT_ESTIMATES * point.estimate_s)


def _left_behind(who: str, row: SessionRow) -> str:
    """Return what to say of a server whose cards were not back at their baseline when the wait for it ended."""
    if row.memory_left_bytes is None:
        return f"WARNING  {who}: whether its memory came back after the stop could not be read"
    left = f"{row.memory_left_bytes / 2**20:.1f} MiB above the baseline"
    if row.memory_left_bytes <= MEMORY_LEFT_BYTES:
        return f"{who}: after the stop its memory stayed {left}, which is within what readings differ by"
    others = "; ".join(row.left_processes or ())
    if row.memory_kept_bytes is None:
        of_whom = f"its own or another's ({others})" if others else "its own or another's"
        return f"WARNING  {who}: after the stop its cards stayed {left}; whether that is {of_whom} cannot be told"
    if row.memory_kept_bytes <= MEMORY_LEFT_BYTES:
        return f"WARNING  {who}: its memory came back after the stop, but others hold its cards {left}: {others}"
    beside = f"; besides, others are on its cards: {others}" if others else ""
    kept = f"{row.memory_kept_bytes / 2**20:.1f} MiB above the baseline"
    return f"WARNING  {who}: its memory did not come back after the stop: {kept}{beside}"
