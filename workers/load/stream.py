"""One answer to a completion or a chat as server-sent events: what came, when, and whether it is a success.

`workers.load.client` gives it the reads of a body after the request (`digest`). Pure: it reads no clock, opens no
connection, and must never raise, whatever a server sends.

`StreamParser` is the meaning; `_quick` gives the same record of an ordinary vLLM stream in a fraction of the time, and
gives up at anything else.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from contract.failures import FailureClass
from contract.rows import Failure
from workers.load.chunks import ChunkReader, size_lines
from workers.load.reads import Reads

MESSAGE_CHARS = 500
"""How much of a server's text is kept in a failure message."""
MAX_EVENT_BYTES = 2**20
"""An event longer than this is no completions chunk: it is dropped and the stream is malformed."""

_FIELDS = (b"data", b"event", b"id", b"retry", b"")  # the last: comments


@dataclass(slots=True)
class StreamRecord:
    """What happened in one stream. Stamps are those the bytes were fed with: when an event's last byte arrived.

    A chunk is an event with a choice; it may hold several tokens, or none of text. In a chat, a choice that only names
    the role comes before any token, and is none. (`vllm bench serve` counts the same events, and that one too; it calls
    the gaps between them inter-token latency, and stamps completions after parsing them.)
    """

    chunk_at_s: list[float] = field(default_factory=list)
    """When each chunk arrived."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    saw_done: bool = False
    error: str | None = None
    """The first error object, as the server wrote it."""
    malformed: str | None = None
    """The first thing that is not a completions stream, in words."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asked for. `prompt_tokens` is None for text and chat, whose length only the server knows."""

    max_tokens: int
    ignore_eos: bool
    prompt_tokens: int | None = None


@dataclass(slots=True)
class StreamParser:
    """Parses a body fed in pieces cut anywhere. Line ends may be LF, CRLF or CR; comments, ids and retries pass."""

    record: StreamRecord = field(default_factory=StreamRecord)
    _rest: list[bytes] = field(default_factory=list)  # of a line whose end has not come: joined once it has
    _rest_bytes: int = 0
    _after_cr: bool = False
    _data: list[bytes] = field(default_factory=list)
    _data_bytes: int = 0  # with what joins them: lines without data have a length, too
    _event: bytes = b""
    _begin: bytes = b""  # of the body, for the message

    def feed(self, data: bytes, at_s: float) -> None:
        """Take the next bytes, which arrived at `at_s`."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
            self._after_cr = False
        if not data:
            return
        if len(self._begin) < MESSAGE_CHARS:
            self._begin += data[: MESSAGE_CHARS - len(self._begin)]
        self._after_cr = data.endswith(b"\r")
        lines = data.splitlines(keepends=True)
        unfinished = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        if lines:
            lines[0] = b"".join([*self._rest, lines[0]])
            self._rest, self._rest_bytes = [], 0
        for line in lines:
            self._take_line(line.rstrip(b"\r\n"), at_s)
        if unfinished:
            self._rest.append(unfinished)
            self._rest_bytes += len(unfinished)
        if self._rest_bytes > MAX_EVENT_BYTES:
            self._rest, self._rest_bytes = [], 0
            self._malformed(f"a line is longer than {MAX_EVENT_BYTES} bytes")

    def close(self) -> None:
        """Take the end of the body. An event it cut short is dropped, as the standard for such streams has it."""
        if not self._rest and not self._data:
            return
        name, colon, _ = b"".join(self._rest).partition(b":")
        known = name in _FIELDS if colon else any(each.startswith(name) for each in _FIELDS)
        if not known:
            self._malformed("not a stream of events")
        elif self.record.saw_done:
            self._malformed("an event was cut short after [DONE]")

    def _take_line(self, line: bytes, at_s: float) -> None:
        if not line:
            if self._data:
                self._take_event(b"\n".join(self._data), at_s)
            self._data, self._data_bytes, self._event = [], 0, b""
            return
        name, _, value = line.removeprefix(b"\xef\xbb\xbf").partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
            if self._data_bytes > MAX_EVENT_BYTES:
                self._data, self._data_bytes = [], 0
                self._malformed(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        elif name == b"event":
            self._event = value
        elif name not in _FIELDS:
            self._malformed("not a stream of events")

    def _take_event(self, data: bytes, at_s: float) -> None:
        record = self.record
        if record.saw_done:
            self._malformed("an event after [DONE]")
            return
        if data == b"[DONE]":
            record.saw_done = True
            return
        try:
            message: Any = json.loads(data.decode())
        except (ValueError, RecursionError):
            message = None
        is_error = self._event == b"error" or (
            isinstance(message, dict) and (message.get("error") is not None or message.get("object") == "error")
        )
        if is_error:
            record.error = record.error or _text(data) or "error event without data"
        elif not isinstance(message, dict) or not isinstance(message.get("choices"), list):
            self._malformed(f"an event is not a completions chunk: {_text(data)}")
        else:
            self._take_chunk(message, at_s)

    def _take_chunk(self, message: dict[str, Any], at_s: float) -> None:
        record = self.record
        if message["choices"]:
            choice = message["choices"][0]
            if len(message["choices"]) > 1 or (isinstance(choice, dict) and choice.get("index")):
                self._malformed("a choice beside the one that was asked for")
                return
            reason = choice.get("finish_reason") if isinstance(choice, dict) else 0
            if reason is not None and not isinstance(reason, str):
                self._malformed("a choice is not an object with a finish_reason")
                return
            delta = choice.get("delta")
            if delta is not None and not isinstance(delta, dict):
                self._malformed("a choice's delta is not an object")
                return
            if reason or delta is None or not _is_preface(delta):
                if record.finish_reason:
                    self._malformed("finish_reason came twice" if reason else "a chunk came after the finish_reason")
                    return
                record.chunk_at_s.append(at_s)
            record.finish_reason = reason or record.finish_reason
        usage = message.get("usage")
        if isinstance(usage, dict):
            counts = self._count(usage.get("prompt_tokens")), self._count(usage.get("completion_tokens"))
            if _contradicts(record, counts):
                self._malformed("usage came twice and contradicts itself")
            record.prompt_tokens, record.completion_tokens = counts
        elif usage is not None:
            self._malformed("usage is not an object")

    def _count(self, value: Any) -> int | None:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63):
            return value
        self._malformed("a token count in usage is not a number of tokens")
        return None

    def _malformed(self, what: str) -> None:
        if self.record.malformed is None:
            self.record.malformed = f"{what}; the body begins: {_text(self._begin)}"


def digest(reads: Reads) -> StreamRecord:
    """Return the record of a body from its reads; a stamp is that of the read that held an event's last byte."""
    record = _quick(reads)
    if record is not None:
        return record
    parser = StreamParser()
    chunks = ChunkReader()
    for data, at_s in zip(reads.data, reads.at_s, strict=True):
        for piece in chunks.feed(data) if reads.chunked else [data]:
            parser.feed(piece, at_s)
        if chunks.broken:
            break
    parser.close()
    if chunks.broken:
        parser.record.malformed = parser.record.malformed or "the answer's chunks are not HTTP's"
    return parser.record


_TOKENS = ("content", "reasoning", "reasoning_content", "tool_calls")
"""Keys of a chat's delta that tokens come in: vLLM's, and `reasoning_content`, its older and others' own."""


def _is_preface(delta: dict[str, Any]) -> bool:
    """Whether a chat's delta says who will speak, or nothing.

    vLLM (0.25 to 0.32) opens every chat with `{"role": "assistant", "content": ""}`, written in one go with the first
    token. A token without text of its own, as of half a letter, is `{"content": ""}` there: that is no preface.
    """
    if delta.get("content"):
        return False
    return not any(delta.get(key) for key in _TOKENS) and ("role" in delta or delta.get("content") is None)


def _contradicts(record: StreamRecord, counts: tuple[int | None, int | None]) -> bool:
    """Whether an earlier usage had another prompt, or more tokens: servers that tell it with each chunk count up."""
    prompt, completion = counts
    return record.prompt_tokens not in (None, prompt) or (
        record.completion_tokens is not None and (completion is None or completion < record.completion_tokens)
    )


class _Choice(msgspec.Struct, gc=False):
    index: Literal[0] = 0
    finish_reason: str | None = None
    delta: dict[str, Any] | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: Annotated[list[_Choice], msgspec.Meta(max_length=1)]
    usage: Any = None
    error: None = None
    object: Literal["text_completion", "chat.completion.chunk"] = "text_completion"


_decode = msgspec.json.Decoder(_Chunk).decode
_QUICK_BYTES = 1536
"""An event of more bytes is left to the parser: it may hold a number of more digits than `json` reads (4,300), or more
levels than Python's stack, and msgspec skips both where nobody asks for them. vLLM's events of a token have 300."""


def _quick(reads: Reads) -> StreamRecord | None:
    """The record of a whole stream of events of one short `data:` line each, its line ends LF; else None."""
    try:
        said, stamps = _events(reads)
        if len(said) < 2 or said.pop() != b"[DONE]" or max(map(len, said)) > _QUICK_BYTES:
            return None
        text = b"".join(said)
        # Read as one: a letter cut over two events is no letter, but then they are no JSON either.
        if b"\n" in text or b"\r" in text or not _is_text(text):
            return None
        record = StreamRecord(saw_done=True)
        stamp, reason = record.chunk_at_s.append, None
        for chunk, at_s in zip(map(_decode, said), stamps[:-1], strict=True):
            if chunk.choices:
                choice = chunk.choices[0]
                found, delta = choice.finish_reason, choice.delta
                if found or delta is None or not _is_preface(delta):
                    if reason:
                        return None
                    stamp(at_s)
                    reason = found or None
            if chunk.usage is not None:
                counts = _plain_counts(chunk.usage)
                if _contradicts(record, counts):
                    return None
                record.prompt_tokens, record.completion_tokens = counts
        record.finish_reason = reason
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None
    return record


def _events(reads: Reads) -> tuple[list[bytes], list[float]]:
    """What stands between `data: ` and the empty line of each event, and the stamp of the read with its last byte.

    It may hold further lines, which the caller has to refuse. Raises `ValueError` where the body is anything else, or
    its chunks are not HTTP's.
    """
    said: list[bytes] = []
    stamps: list[float] = []
    chunks, rest, between = ChunkReader(), b"", reads.chunked
    for data, at_s in zip(reads.data, reads.at_s, strict=True):
        if between and data.startswith(begins := _begins(len(data))) and data.endswith(b"\n\n\r\n"):
            event = data[len(begins[0]) : -4]
            if b"\n" not in event:
                said.append(event)
                stamps.append(at_s)
                continue
        for piece in chunks.feed(data) if reads.chunked else [data]:
            *events, rest = (rest + piece).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: "):
                    raise ValueError(event)
                said.append(event[6:])
                stamps.append(at_s)
            if len(rest) > _QUICK_BYTES:
                raise ValueError(rest)
        if chunks.broken:
            raise ValueError(data)
        between = reads.chunked and chunks.between and not rest
    if rest:
        raise ValueError(rest)
    return said, stamps


@functools.lru_cache(4096)
def _begins(length: int) -> tuple[bytes, ...]:
    """What a read of so many bytes begins with where it is one HTTP chunk with one event, as servers write them."""
    return tuple(line + b"data: " for line in size_lines(length))


def _is_text(raw: bytes) -> bool:
    if raw.isascii():
        return True
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _plain_counts(usage: Any) -> tuple[int | None, int | None]:
    """Raises `ValueError` for anything but token counts, which the parser has words for."""
    if not isinstance(usage, dict):
        raise ValueError("usage")
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if any(count is not None and (type(count) is not int or not 0 <= count < 2**63) for count in counts):
        raise ValueError("usage")
    return counts


def judge(record: StreamRecord, asked: Asked) -> Failure | None:
    """Return why a stream that ended by itself (HTTP 200) is no success, or None when it is one.

    Success needs a well-formed stream without an error object, `[DONE]`, a finish reason, usage, and the tokens asked
    for: exactly `max_tokens` where `ignore_eos` was sent or the reason is "length", at most that many where it is
    "stop"; they may come in fewer chunks, and in one more, for servers that end a stream with a chunk of its own
    (whether that one holds text is not looked at); and, where the prompt was token ids, exactly those as prompt tokens.
    The first lack in this order names the failure. (`vllm bench serve` 0.32 calls any of these a success as long as one
    chunk came.)
    """
    if record.error is not None:
        return Failure(FailureClass.IN_BAND_ERROR, record.error)
    if record.malformed is not None:
        return Failure(FailureClass.MALFORMED_STREAM, record.malformed)
    if not record.saw_done:
        return Failure(FailureClass.NO_DONE, f"the stream ended after {len(record.chunk_at_s)} chunks without [DONE]")
    if record.finish_reason is None:
        return Failure(FailureClass.NO_FINISH_REASON, f"none of {len(record.chunk_at_s)} chunks has a finish_reason")
    if record.finish_reason not in ("length", "stop"):
        return Failure(FailureClass.UNEXPECTED_FINISH_REASON, record.finish_reason[:MESSAGE_CHARS])
    if record.completion_tokens is None:
        return Failure(FailureClass.NO_USAGE, "the stream has no usage.completion_tokens")
    exact = asked.ignore_eos or record.finish_reason == "length"
    if record.completion_tokens > asked.max_tokens or (exact and record.completion_tokens != asked.max_tokens):
        what = f"{record.completion_tokens} completion tokens ({record.finish_reason}), asked for {asked.max_tokens}"
        return Failure(FailureClass.WRONG_TOKEN_COUNT, what)
    if len(record.chunk_at_s) > record.completion_tokens + 1:
        what = f"{len(record.chunk_at_s)} chunks came, the server counted {record.completion_tokens} completion tokens"
        return Failure(FailureClass.WRONG_TOKEN_COUNT, what)
    if asked.prompt_tokens is not None and record.prompt_tokens != asked.prompt_tokens:
        what = f"the server counted {record.prompt_tokens} prompt tokens, {asked.prompt_tokens} were sent"
        return Failure(FailureClass.WRONG_TOKEN_COUNT, what)
    return None


def _text(data: bytes) -> str:
    return data.decode(errors="replace")[:MESSAGE_CHARS]
