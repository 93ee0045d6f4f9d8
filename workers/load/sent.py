"""One request and all that came back, and its row: judged when the window has closed. Pure but for its imports.

A failed request becomes a row, never an exception or a second try.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError

from contract.failures import FailureClass
from contract.rows import Failure, RequestRow
from workers.load.endpoint import NO_SOCKET, in_words
from workers.load.stream import MESSAGE_CHARS, Asked, StreamRecord, digest, judge
from workers.load.wire import Answer


@dataclass(slots=True)
class Sent:
    """One request and all that came back; judged when the window has closed."""

    ordinal: int
    asked: Asked
    answer: Answer
    ended_s: float = 0.0
    due_s: float | None = None
    """Of an open loop: when it should have been sent."""
    connect_s: float | None = None
    """Of an open loop: how long it waited for its connection, before it was sent; None where it got none."""
    free_s: float | None = None
    """Of a closed loop: when its stream had become free; None for the first of the stream."""
    error: Exception | None = None

    @property
    def slip_s(self) -> float | None:
        """How much later than due, or than its stream had become free, it was sent, connecting left out."""
        could_s = self.free_s if self.due_s is None else self.due_s
        return None if could_s is None else self.answer.sent_s - (self.connect_s or 0.0) - could_s


def row_of(sent: Sent, timeout_s: float, started_s: float) -> RequestRow:
    """Judge one request of a window that opened at `started_s`: digest what came back and turn it into its row."""
    answer = sent.answer
    record, failure = _judged(sent, timeout_s)
    row = RequestRow(
        sent.ordinal,
        sent_s=answer.sent_s - started_s,
        ok=failure is None,
        due_s=_after(sent.due_s, started_s),
        connect_s=sent.connect_s,
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


def _judged(sent: Sent, timeout_s: float) -> tuple[StreamRecord, Failure | None]:
    answer = sent.answer
    if answer.status is not None and answer.status != 200:
        begin = _begin(answer)
        message = f"HTTP {answer.status}: {begin}" if begin else f"HTTP {answer.status} with an empty body"
        if answer.retry_after is not None:
            message += f" (Retry-After: {answer.retry_after[:MESSAGE_CHARS]})"
        return StreamRecord(), Failure(FailureClass.HTTP_ERROR, message)
    if answer.reads.given_up_at is not None:
        what = f"given up after {answer.reads.given_up_at} bytes: more than an answer of {sent.asked.max_tokens} tokens"
        words = f"{what} may take; the body begins: {_begin(answer)}"
        return StreamRecord(), Failure(FailureClass.MALFORMED_STREAM, words)
    record = digest(answer.reads)
    if sent.error is not None and record.error is None:
        return record, _broken(sent.error, timeout_s, answer, record)
    return record, judge(record, sent.asked)


def _after(at_s: float | None, start_s: float) -> float | None:
    return None if at_s is None else at_s - start_s


def _begin(answer: Answer) -> str:
    return answer.reads.begin[: 4 * MESSAGE_CHARS].decode(errors="replace")[:MESSAGE_CHARS]


def _broken(error: Exception, timeout_s: float, answer: Answer, record: StreamRecord) -> Failure:
    """Map what ended a request from outside its stream to a failure; the one place that knows aiohttp's exceptions.

    What had come and is no stream of events is quoted: it may be a server's word on why.
    """
    what = in_words(error)[:MESSAGE_CHARS]
    if isinstance(error, OSError) and error.errno in NO_SOCKET:
        return Failure(FailureClass.CLIENT_SOCKETS, what)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError):
        return Failure(FailureClass.CONNECTION_FAILED, what)
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return Failure(FailureClass.MALFORMED_STREAM, f"the answer is not HTTP: {what}")
    if isinstance(error.__cause__, ContentEncodingError):
        return Failure(FailureClass.MALFORMED_STREAM, what)
    after = f"after {len(record.chunk_at_s)} chunks" + (f"; {record.malformed}" if record.malformed else "")
    if isinstance(error, TimeoutError):
        return Failure(FailureClass.TIMEOUT, f"no end within {timeout_s:g} s, {_phase(answer, record)}, {after}")
    return Failure(FailureClass.CONNECTION_LOST, f"{what}, {after}")


def _phase(answer: Answer, record: StreamRecord) -> str:
    if not answer.asked:
        return "while connecting"
    if answer.status is None:
        return "while waiting for the answer's head"
    return "while streaming" if record.chunk_at_s else "while waiting for the first chunk"
