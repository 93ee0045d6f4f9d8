"""One load level against one server: a closed loop or an open one, every answer judged.

Called by a Ray task on the server's own node (`generate`) and by the command line. Inside the window it sends, keeps
what it reads and makes bodies ahead of need, a little at a time; answers are judged after it has closed. A failed
request becomes a row, never an exception or a second try.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from contract.lateness import OWN_RAISED
from workers.load import event_loop
from workers.load.bodies import Bodies, Prepared
from workers.load.ending import Ending
from workers.load.endpoint import KEEPALIVE_S, open_session
from workers.load.failed import TooFewFiles
from workers.load.limits import achieved_share
from workers.load.plan import LoadPlan, LoadResult
from workers.load.sent import Sent, row_of
from workers.load.stalls import held_back, raised_by, stood_s
from workers.load.summary import percentile
from workers.load.watch import Watch, undisturbed
from workers.load.wire import Answer, Line, Wire

CONNECT_LIMIT_S = 10.0
"""For connecting all lines before the window opens."""
FURTHER_FILES = 16
"""Files that a load opens besides its connections: the event loop's, those it reads of its own CPU time."""


def generate(plan: LoadPlan) -> LoadResult:
    """Run `plan` in this process and return its rows; for callers without a running event loop.

    Raises:
        TooFewFiles: it needs more connections than this process may have.
        LoadLost: another process of the level did not come to the start.
    """
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    allow_connections(min(plan.concurrency, plan.num_requests))
    return event_loop.run(run_load(plan))


def allow_connections(number: int) -> None:
    """Let this process open as many files as the system allows (1,024 is a usual limit; a connection is a file).

    Raises:
        TooFewFiles: that is less than `number` connections need.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    needed = number + FURTHER_FILES + len(list(Path("/proc/self/fd").iterdir()))
    if most != resource.RLIM_INFINITY and needed > most:
        raise TooFewFiles(
            f"{number} connections need {needed} open files, and their process may have {most} (ulimit -Hn)"
        )


async def run_load(plan: LoadPlan, ended: Callable[[Sent], None] | None = None) -> LoadResult:
    """Send the plan's requests and return one row for each that was sent. `ended` is told of each as it ends.

    `plan.concurrency` lines are connected before the window opens. TTFT runs from just before the send (connecting is
    in it only where a line's connection has ended) to the first chunk that carries a choice, E2EL to the last one; TPOT
    is their difference over completion_tokens - 1. `vllm bench serve` takes the same start and ends, but makes its JSON
    inside the latency, counts a stream that breaks off as a success and puts TPOT at 0 for answers of one token.
    Percentiles and throughput: see `workers.load.summary`.

    With `plan.start` the window opens when all processes of the level are connected, at one moment for all of them: one
    that wakes up later is late by that, as its requests of an open loop are; of a closed loop its streams were idle.
    Cancelling it closes its connections, on which vLLM aborts the requests.
    """
    sent: list[Sent] = []

    def keep(done: Sent) -> None:
        sent.append(done)
        if ended is not None:
            ended(done)

    with contextlib.closing(Bodies(plan)) as bodies:
        async with _lines(plan) as lines:
            start_s = None if plan.start is None else await plan.start.wait()
            with undisturbed():
                watch = Watch(lambda: sum(line.busy for line in lines), start_s)
                ending = Ending(plan.stop, watch.started_s, plan.start)
                if plan.due_s:
                    await _open_loop(lines, bodies, plan, watch.started_s, keep)
                else:
                    await _closed_loop(lines, bodies, plan, ending, keep)
                duration_s = time.monotonic() - watch.started_s
                client = watch.stop(len(lines), duration_s)
    judging_s = time.thread_time()
    sent.sort(key=lambda each: each.ordinal)
    _leave_stalls_out(sent, watch)
    slips = [each.slip_s for each in sent if each.slip_s is not None]
    client.slip_p99_s, client.slip_max_s = percentile(slips, 99), max(slips, default=None)
    rows = [row_of(each, plan.timeout_s, watch.started_s) for each in sent]
    held = held_back(rows, watch.stalls)
    raised = raised_by(rows, held)
    for column in OWN_RAISED:
        setattr(client, column, getattr(raised, column))
    judging_s = time.thread_time() - judging_s
    return LoadResult(
        rows,
        duration_s,
        watch.started_s,
        watch.started_wall_s,
        [client],
        ending.by,
        judging_s,
        achieved_share=None if plan.due_s else achieved_share(rows, plan.concurrency),
        held_back=held,
    )


async def _closed_loop(
    lines: list[Line], prepared: Iterable[Prepared], plan: LoadPlan, ending: Ending, keep: Callable[[Sent], None]
) -> None:
    """Every line sends its next request as soon as its last has ended."""
    waiting = _until(ending, prepared)

    async def work(line: Line) -> None:
        free_s: float | None = None
        for request in waiting:
            done = await _send(line, request, plan.timeout_s)
            done.free_s = free_s
            answer, at_s = done.answer, done.answer.reads.at_s
            free_s = at_s[-1] if at_s and done.error is None else done.ended_s
            if done.error is None and answer.status == 200 and at_s:
                ending.note(at_s[0] - answer.sent_s, free_s - answer.sent_s)
            keep(done)

    looking = asyncio.ensure_future(ending.watch())
    try:
        async with asyncio.TaskGroup() as group:
            for line in lines:
                group.create_task(work(line))
    finally:
        looking.cancel()


def _until(ending: Ending, prepared: Iterable[Prepared]) -> Iterator[Prepared]:
    for request in prepared:
        if ending.reached():
            return
        yield request


async def _open_loop(
    lines: list[Line], prepared: Iterable[Prepared], plan: LoadPlan, started_s: float, keep: Callable[[Sent], None]
) -> None:
    """Every request is sent when it is due, over a line that is free, or over a new one."""
    free = list(lines)

    async def one(request: Prepared, due_s: float) -> None:
        if free:
            line = free.pop()
        else:
            line = lines[0].another()
            lines.append(line)
        keep(await _send(line, request, plan.timeout_s, due_s))
        free.append(line)

    async with asyncio.TaskGroup() as group:
        for request, after_s in zip(prepared, plan.due_s, strict=True):
            while (early_s := started_s + after_s - time.monotonic()) > 0:  # noqa: ASYNC110 - timers wake up early
                await asyncio.sleep(early_s)
            group.create_task(one(request, started_s + after_s))


async def _send(line: Line, request: Prepared, timeout_s: float, due_s: float | None = None) -> Sent:
    """Send one request; one that is due at a moment first gets its connection, which so is in no latency of it, nor in
    how late it was sent."""
    sent = Sent(request.ordinal, request.asked, Answer(time.monotonic(), request.most_bytes), due_s=due_s)
    try:
        async with asyncio.timeout(timeout_s):
            if due_s is not None:
                await line.open()
                taken_up_s, sent.answer.sent_s = sent.answer.sent_s, time.monotonic()
                sent.connect_s = sent.answer.sent_s - taken_up_s
            await line.post(request.body, sent.answer)
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        sent.error = error
    sent.ended_s = time.monotonic()
    return sent


def _leave_stalls_out(sent: Iterable[Sent], watch: Watch) -> None:
    """Take what the event loop stood out of the times of connecting: that was this process's delay, not the server's or
    the network's."""
    for each in sent:
        if each.connect_s is not None:
            sent_s = each.answer.sent_s - watch.started_s
            each.connect_s -= stood_s(sent_s - each.connect_s, sent_s, watch.stalls)


@contextlib.asynccontextmanager
async def _lines(plan: LoadPlan) -> AsyncIterator[list[Line]]:
    """The lines of a load, connected; one that cannot be is left to its first request, whose row will say why."""
    async with open_session(plan.endpoint) as session:
        wire = Wire(session, plan.endpoint.load_url(plan.api), plan.endpoint.proxy())
        lines = [Line(wire, KEEPALIVE_S) for _ in range(min(plan.concurrency, plan.num_requests))]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(plan.timeout_s, CONNECT_LIMIT_S)):
                    await asyncio.gather(*(line.open() for line in lines), return_exceptions=True)
            yield lines
        finally:
            for line in lines:
                line.close()
