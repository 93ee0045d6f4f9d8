"""A closed loop of completions requests on one server, every answer judged.

Called by a Ray task on the server's own node (`generate`) and by the command line. Inside the window it only sends and
reads: prompts and bodies are made before it opens. A failed request becomes a row, never an exception or a second try.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from contract.failures import FailureClass
from contract.rows import Failure, RequestRow
from workers.load.endpoint import Endpoint, open_session
from workers.load.prompts import PromptFactory, text_prompt
from workers.load.stream import MESSAGE_CHARS, Asked, StreamParser, judge

_LARGE_BODY_BYTES = 2**20  # from here on aiohttp wants a file, to write it in pieces


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load level. Temperature is 0 and answers are streamed with usage.

    Raises:
        ValueError: a count or the time limit is below 1 (or not above 0), or `first_ordinal` is negative.
    """

    endpoint: Endpoint
    concurrency: int
    """Requests in flight: each of so many workers sends its next one as soon as its last has ended."""
    num_requests: int
    prompt_tokens: int
    """Exact length of every prompt; not looked at with `text`."""
    output_tokens: int
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
    text: str | None = None
    """Send this text behind a prefix unique per (seed, ordinal) instead of token ids."""

    def __post_init__(self) -> None:
        for name in (
            "concurrency",
            "num_requests",
            "output_tokens",
            *(("prompt_tokens",) if self.text is None else ()),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least 1")
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
    cpu_wait_s: float | None = None
    """How long the client stood ready to run and had no core, within the window; None where Linux does not say.
    Every stamp can be late by some of it."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    ordinal: int
    body: bytes


def generate(plan: LoadPlan) -> LoadResult:
    """Run `plan` on uvloop in this process and return its rows; for callers without a running event loop."""
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    return uvloop.run(run_load(plan))


async def run_load(plan: LoadPlan) -> LoadResult:
    """Send the plan's requests, `plan.concurrency` at a time, and return one row for each.

    TTFT runs from just before the send (connecting is in it, where no idle connection is at hand) to the first chunk
    that carries a choice, E2EL to the last one; TPOT is their difference over completion_tokens - 1. `vllm bench serve`
    takes the same start and ends, but makes its JSON inside the latency, counts a stream that breaks off as a success
    and puts TPOT at 0 for answers of one token. Percentiles and throughput: see `workers.load.summary`.

    Cancelling it closes its connections, on which vLLM aborts the requests.
    """
    prepared = iter(list(_prepare(plan)))
    proxy = plan.endpoint.proxy()
    rows: list[RequestRow] = []

    async def work(sender: _Sender) -> None:
        for request in prepared:
            rows.append(await sender.send(request))

    async with open_session(plan.endpoint) as session:
        waited_before_s = _cpu_wait_s()
        started_wall_s, started_s = time.time(), time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(plan.concurrency, plan.num_requests)):
                group.create_task(work(_Sender(session, plan, started_s, proxy)))
        duration_s = time.monotonic() - started_s
        waited_s = _cpu_wait_s()
    rows.sort(key=lambda row: row.ordinal)
    waited = None if waited_s is None or waited_before_s is None else waited_s - waited_before_s
    return LoadResult(rows, duration_s, started_s, started_wall_s, waited)


def _cpu_wait_s() -> float | None:
    """Time that this thread has waited on a run queue (second field of schedstat, in ns; Linux, sched-stats)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


def _prepare(plan: LoadPlan) -> Iterator[_Prepared]:
    fields: dict[str, Any] = {
        "model": plan.endpoint.model,
        "max_tokens": plan.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if plan.ignore_eos:
        fields["ignore_eos"] = True
    factory = PromptFactory(plan.vocab_size, plan.seed) if plan.text is None else None
    for ordinal in range(plan.first_ordinal, plan.first_ordinal + plan.num_requests):
        prompt: str | list[int]
        if factory is not None:
            prompt = factory.tokens(ordinal, plan.prompt_tokens)
        else:
            prompt = text_prompt(plan.text or "", plan.seed, ordinal)
        yield _Prepared(ordinal, json.dumps(fields | {"prompt": prompt}, separators=(",", ":")).encode())


@dataclass(frozen=True, slots=True)
class _Sender:
    """One worker of the closed loop: sends a request and turns what happens into its row."""

    session: aiohttp.ClientSession
    plan: LoadPlan
    started_s: float
    proxy: str | None

    async def send(self, request: _Prepared) -> RequestRow:
        parser, refusal = StreamParser(), bytearray()
        status: int | None = None
        broken: Failure | None = None
        body = request.body if len(request.body) < _LARGE_BODY_BYTES else io.BytesIO(request.body)
        sent_s = time.monotonic()
        try:
            async with (
                asyncio.timeout(self.plan.timeout_s),
                self.session.post(
                    self.plan.endpoint.completions_url,
                    data=body,
                    headers={"Content-Type": "application/json"},
                    proxy=self.proxy,
                    allow_redirects=False,
                ) as response,
            ):
                status = response.status
                async for data in response.content.iter_any():
                    at_s = time.monotonic()
                    if status == 200:
                        parser.feed(data, at_s)
                    else:
                        refusal += data[: 4 * MESSAGE_CHARS - len(refusal)]
                parser.close()
        except (aiohttp.ClientError, OSError) as error:
            broken = _broken(error, self.plan.timeout_s, parser.record.chunks)
        return self._row(request.ordinal, sent_s, time.monotonic(), status, bytes(refusal), broken, parser)

    def _row(
        self,
        ordinal: int,
        sent_s: float,
        ended_s: float,
        status: int | None,
        refusal: bytes,
        broken: Failure | None,
        parser: StreamParser,
    ) -> RequestRow:
        record, plan = parser.record, self.plan
        failure: Failure | None
        if status is not None and status != 200:
            words = refusal.decode(errors="replace")[:MESSAGE_CHARS]
            failure = Failure(FailureClass.HTTP_ERROR, words or f"HTTP {status} with an empty body")
        elif broken is not None and record.error is None:
            failure = broken
        else:
            asked = Asked(plan.output_tokens, plan.ignore_eos, plan.prompt_tokens if plan.text is None else None)
            failure = judge(record, asked)
        row = RequestRow(
            ordinal,
            sent_s=sent_s - self.started_s,
            ok=failure is None,
            prompt_tokens=record.prompt_tokens,
            completion_tokens=record.completion_tokens,
            chunks=record.chunks,
            finish_reason=record.finish_reason,
            http_status=status,
            e2e_s=ended_s - sent_s,
        )
        if record.first_chunk_s is not None:
            row.ttft_s = record.first_chunk_s - sent_s
        if failure is not None:
            row.failure_class, row.failure_message = failure.failure_class, failure.message
        elif record.first_chunk_s is not None and record.last_chunk_s is not None:
            row.e2e_s = record.last_chunk_s - sent_s
            if record.completion_tokens is not None and record.completion_tokens > 1:
                row.tpot_s = (record.last_chunk_s - record.first_chunk_s) / (record.completion_tokens - 1)
        return row


def _broken(error: Exception, timeout_s: float, chunks: int) -> Failure:
    """Map what ended a request from outside its stream to a failure; the one place that knows aiohttp's exceptions."""
    after = f"after {chunks} chunks"
    what = f"{error or type(error).__name__}"[:MESSAGE_CHARS]
    if isinstance(error, aiohttp.ClientConnectorError):
        return Failure(FailureClass.CONNECTION_FAILED, what)
    if isinstance(error, TimeoutError):
        return Failure(FailureClass.TIMEOUT, f"no end within {timeout_s:g} s, {after}")
    if isinstance(error, aiohttp.ClientResponseError):
        return Failure(FailureClass.MALFORMED_STREAM, f"the answer is not HTTP: {what}")
    return Failure(FailureClass.CONNECTION_LOST, f"{what}, {after}")
