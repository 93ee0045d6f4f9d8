"""A closed loop of completions or chat requests on one server, every answer judged.

Called by a Ray task on the server's own node (`generate`) and by the command line. Inside the window it only sends and
keeps what it reads: bodies are made before it opens, answers are judged after it has closed. A failed request becomes a
row, never an exception or a second try.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp.http_exceptions import HttpProcessingError

from contract.failures import FailureClass
from contract.lengths import Lengths, draw, lowest
from contract.rows import ClientRow, Failure, RequestRow
from contract.specs import Api, SharedPrefix
from workers.load.endpoint import KEEPALIVE_S, Endpoint, open_session
from workers.load.prompts import ASSUMED_COST, GivenText, PromptFactory, TextCost, WordPrompts
from workers.load.start_line import StartLine
from workers.load.stream import MESSAGE_CHARS, Asked, StreamRecord, digest, judge
from workers.load.summary import percentile
from workers.load.wire import MAX_BODY_BYTES, Answer, Line, Wire

TICK_S = 0.02
CONNECT_LIMIT_S = 10.0
"""For connecting all lines before the window opens."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load level. Temperature is 0 and answers are streamed with usage.

    Raises:
        ValueError: a count or the time limit is below 1 (or not above 0), a prompt has no token behind its shared
            prefix, or `first_ordinal` is negative.
    """

    endpoint: Endpoint
    concurrency: int
    """Requests in flight: each of so many workers sends its next one as soon as its last has ended."""
    num_requests: int
    prompt_tokens: Lengths
    """Of every prompt: exact for completions, about it with its template for chat; not looked at with `text`."""
    output_tokens: Lengths
    """max_tokens, and with `ignore_eos` the exact length of every answer."""
    first_ordinal: int
    """Ordinal of the first request. Ordinals must never be used twice on one server: they make prompts unique."""
    vocab_size: int
    """Of the model; not looked at with `text`."""
    seed: int
    timeout_s: float
    """Time limit of one request, from its send to the end of its body."""
    ignore_eos: bool = True
    """A vLLM extension; False does not send it, for servers that refuse unknown fields."""
    cores: tuple[int, ...] = ()
    """Cores that `generate` keeps to; empty: any. A server that binds its compute threads to cores starves what shares
    them."""
    start: StartLine | None = None
    """Where to wait for the other processes of the level before the window opens."""
    text: str | None = None
    """Send this text behind a prefix unique per (seed, ordinal) instead of token ids or drawn words."""
    api: Api = Api.COMPLETIONS
    shared_prefix: SharedPrefix | None = None
    text_cost: TextCost = ASSUMED_COST
    """Of a chat's words on this server."""
    offset: int = 0
    """Requests of the level that other plans send before this one's first. Lengths and shared prefixes go by a
    request's number in its level, not by its ordinal: so they do not depend on what the server was asked before."""

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "num_requests": 1, "output_tokens": 1}
        if self.text is None:
            least["prompt_tokens"] = 1 + (self.shared_prefix.tokens if self.shared_prefix else 0)
        for name, limit in least.items():
            if lowest(getattr(self, name)) < limit:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least {limit}")
        if self.first_ordinal < 0:
            raise ValueError(f"first_ordinal is {self.first_ordinal}: must not be negative")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {self.timeout_s}: must be above 0")


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What one load level gave. Times in `requests` are seconds since the window opened."""

    requests: list[RequestRow]
    """By ordinal, failed ones included. In a failed row `e2e_s` is the time from its send until it was given up."""
    duration_s: float
    """From the window's opening (the first send) to the last byte or failure of the last request."""
    started_monotonic_s: float
    """The window's opening on `time.monotonic()`, which all processes of a host share."""
    started_wall_s: float
    """The same moment as seconds since the epoch, for provenance only."""
    clients: list[ClientRow]
    """One for each process that took part."""
    judging_cpu_s: float = 0.0
    """CPU time of judging the answers, after the window."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    ordinal: int
    body: bytes
    asked: Asked


def generate(plan: LoadPlan) -> LoadResult:
    """Run `plan` on uvloop in this process and return its rows; for callers without a running event loop."""
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    return uvloop.run(run_load(plan))


async def run_load(plan: LoadPlan) -> LoadResult:
    """Send the plan's requests, `plan.concurrency` at a time, and return one row for each.

    Every one of the `plan.concurrency` lines is connected before the window opens. TTFT runs from just before the send
    (connecting is in it only where a line's connection has ended) to the first chunk that carries a choice, E2EL to the
    last one; TPOT is their difference over completion_tokens - 1. `vllm bench serve` takes the same start and ends, but
    makes its JSON inside the latency, counts a stream that breaks off as a success and puts TPOT at 0 for answers of
    one token. Percentiles and throughput: see `workers.load.summary`.

    With `plan.start` the window opens when all processes of the level are connected. Cancelling it closes its
    connections, on which vLLM aborts the requests.
    """
    prepared = iter(list(_prepare(plan)))
    sent: list[_Sent] = []

    async def work(line: Line) -> None:
        free_s: float | None = None
        for request in prepared:
            done = await _send(line, request, plan.timeout_s)
            done.slip_s = None if free_s is None else done.answer.sent_s - free_s
            free_s = done.answer.reads.at_s[-1] if done.answer.reads.at_s else done.ended_s
            sent.append(done)

    async with _lines(plan) as lines:
        if plan.start is not None:
            await plan.start.wait()
        with _undisturbed():
            watch = _Watch()
            async with asyncio.TaskGroup() as group:
                for line in lines:
                    group.create_task(work(line))
            duration_s = time.monotonic() - watch.started_s
            client = watch.stop(len(lines), duration_s, [each.slip_s for each in sent if each.slip_s is not None])
    judging_s = time.thread_time()
    sent.sort(key=lambda each: each.ordinal)
    rows = [_row(each, plan, watch.started_s) for each in sent]
    return LoadResult(rows, duration_s, watch.started_s, watch.started_wall_s, [client], time.thread_time() - judging_s)


class _Watch:
    """What the client itself did in a window, from its making to `stop`."""

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._ticking = asyncio.ensure_future(self._tick())
        self._waited_s = _cpu_wait_s()
        self._cpu_s = time.thread_time()
        self.started_wall_s, self.started_s = time.time(), time.monotonic()

    async def _tick(self) -> None:
        while True:
            due_s = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self._lags.append(max(time.monotonic() - due_s, 0.0))

    def stop(self, streams: int, duration_s: float, slips: list[float]) -> ClientRow:
        """Return the row of this process."""
        self._ticking.cancel()
        cpu_s, waited_s = time.thread_time() - self._cpu_s, _cpu_wait_s()
        waited = None if waited_s is None or self._waited_s is None else waited_s - self._waited_s
        return ClientRow(
            streams,
            cpu_share=cpu_s / duration_s,
            wait_share=None if waited is None else waited / duration_s,
            lag_p99_s=percentile(self._lags, 99),
            lag_max_s=max(self._lags, default=None),
            late_share=sum(self._lags) / duration_s,
            slip_p99_s=percentile(slips, 99),
            slip_max_s=max(slips, default=None),
        )


@contextlib.asynccontextmanager
async def _lines(plan: LoadPlan) -> AsyncIterator[list[Line]]:
    """The lines of a load, connected; one that cannot be is left to its first request, whose row will say why."""
    async with open_session(plan.endpoint) as session:
        chat = plan.api is Api.CHAT
        url = plan.endpoint.chat_url if chat else plan.endpoint.completions_url
        wire = Wire(session, url, plan.endpoint.proxy())
        lines = [Line(wire, KEEPALIVE_S) for _ in range(min(plan.concurrency, plan.num_requests))]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(plan.timeout_s, CONNECT_LIMIT_S)):
                    await asyncio.gather(*(line.open() for line in lines), return_exceptions=True)
            yield lines
        finally:
            for line in lines:
                line.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the garbage collector out of a measured window: a full collection stops every stream for its time."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _cpu_wait_s() -> float | None:
    """Time that this thread has waited on a run queue (second field of schedstat, in ns; Linux, sched-stats)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


def _prepare(plan: LoadPlan) -> Iterator[_Prepared]:
    fields: dict[str, Any] = {
        "model": plan.endpoint.model,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if plan.ignore_eos:
        fields["ignore_eos"] = True
    prompts = _prompts(plan)
    for index in range(plan.num_requests):
        ordinal, number = plan.first_ordinal + index, plan.offset + index
        prompt_tokens = draw(plan.prompt_tokens, "prompt", plan.seed, number)
        max_tokens = draw(plan.output_tokens, "output", plan.seed, number)
        prompt = prompts.prompt(ordinal, number, prompt_tokens)
        what = {"messages": [{"role": "user", "content": prompt}]} if plan.api is Api.CHAT else {"prompt": prompt}
        body = json.dumps(fields | {"max_tokens": max_tokens} | what, separators=(",", ":")).encode()
        exact = isinstance(prompts, PromptFactory)
        yield _Prepared(ordinal, body, Asked(max_tokens, plan.ignore_eos, prompt_tokens if exact else None))


def _prompts(plan: LoadPlan) -> PromptFactory | WordPrompts | GivenText:
    if plan.text is not None:
        return GivenText(plan.text, plan.seed)
    if plan.api is Api.CHAT:
        return WordPrompts(plan.seed, plan.text_cost, plan.shared_prefix)
    return PromptFactory(plan.vocab_size, plan.seed, plan.shared_prefix)


@dataclass(slots=True)
class _Sent:
    """One request and all that came back; judged when the window has closed."""

    ordinal: int
    asked: Asked
    answer: Answer
    ended_s: float = 0.0
    slip_s: float | None = None
    error: Exception | None = None


async def _send(line: Line, request: _Prepared, timeout_s: float) -> _Sent:
    sent = _Sent(request.ordinal, request.asked, Answer(time.monotonic()))
    try:
        async with asyncio.timeout(timeout_s):
            await line.post(request.body, sent.answer)
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        sent.error = error
    sent.ended_s = time.monotonic()
    return sent


def _row(sent: _Sent, plan: LoadPlan, started_s: float) -> RequestRow:
    """Judge one request: digest what came back and turn it into its row."""
    answer = sent.answer
    record, failure = _judged(sent, plan)
    row = RequestRow(
        sent.ordinal,
        sent_s=answer.sent_s - started_s,
        ok=failure is None,
        first_byte_s=_after(answer.first_byte_s, answer.sent_s),
        last_byte_s=_after(answer.reads.at_s[-1], answer.sent_s) if answer.reads.at_s else None,
        body_bytes=answer.reads.size,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        chunks=len(record.chunk_at_s),
        finish_reason=record.finish_reason,
        http_status=answer.status,
        e2e_s=sent.ended_s - answer.sent_s,
    )
    if record.chunk_at_s:
        first_s, last_s = record.chunk_at_s[0], record.chunk_at_s[-1]
        row.ttft_s = first_s - answer.sent_s
        row.gaps_us = [round((later - earlier) * 1e6) for earlier, later in pairwise(record.chunk_at_s)]
        if failure is None:
            row.e2e_s = last_s - answer.sent_s
            if record.completion_tokens is not None and record.completion_tokens > 1:
                row.tpot_s = (last_s - first_s) / (record.completion_tokens - 1)
    if failure is not None:
        row.failure_class, row.failure_message = failure.failure_class, failure.message
    return row


def _judged(sent: _Sent, plan: LoadPlan) -> tuple[StreamRecord, Failure | None]:
    answer = sent.answer
    if answer.status is not None and answer.status != 200:
        words = b"".join(answer.reads.data)[: 4 * MESSAGE_CHARS].decode(errors="replace")[:MESSAGE_CHARS]
        message = words or f"HTTP {answer.status} with an empty body"
        return StreamRecord(), Failure(FailureClass.HTTP_ERROR, message)
    record = digest(answer.reads)
    if answer.reads.size > MAX_BODY_BYTES:
        return record, Failure(FailureClass.MALFORMED_STREAM, f"the answer is longer than {MAX_BODY_BYTES} bytes")
    if sent.error is not None and record.error is None:
        return record, _broken(sent.error, plan.timeout_s, len(record.chunk_at_s))
    return record, judge(record, sent.asked)


def _after(at_s: float | None, start_s: float) -> float | None:
    return None if at_s is None else at_s - start_s


def _broken(error: Exception, timeout_s: float, chunks: int) -> Failure:
    """Map what ended a request from outside its stream to a failure; the one place that knows aiohttp's exceptions."""
    after = f"after {chunks} chunks"
    what = f"{error or type(error).__name__}"[:MESSAGE_CHARS]
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError):
        return Failure(FailureClass.CONNECTION_FAILED, what)
    if isinstance(error, TimeoutError):
        return Failure(FailureClass.TIMEOUT, f"no end within {timeout_s:g} s, {after}")
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return Failure(FailureClass.MALFORMED_STREAM, f"the answer is not HTTP: {what}")
    return Failure(FailureClass.CONNECTION_LOST, f"{what}, {after}")
