"""The wire against servers that write whatever they like: each answer judged right, none waited for in vain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gzip
import itertools
import json
import socket
import ssl
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
import trustme
import uvloop
from aiohttp.http_exceptions import HttpProcessingError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from contract.failures import FailureClass
from contract.rows import RequestRow
from contract.specs import Api
from tests.mock_openai import MockOpenAI, serving
from tests.raw_server import RawServer, Script, has_ipv6, raw_server, tunnel
from workers.load import wire
from workers.load.client import generate
from workers.load.endpoint import Endpoint, in_words, open_session
from workers.load.memory import most_bytes
from workers.load.plan import LoadPlan
from workers.load.reads import BEGIN_BYTES, BYTES_A_READ, Reads
from workers.load.stream import Asked, digest, judge

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23}


def event(message: Any, newline: bytes = b"\n") -> bytes:
    return b"data: " + (message if isinstance(message, bytes) else json.dumps(message).encode()) + 2 * newline


def token(reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "é", "finish_reason": reason}], "usage": None}


EVENTS = [
    event(token()),
    event(token()),
    event(token("length")),
    event({"choices": [], "usage": USAGE}),
    event(b"[DONE]"),
]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def with_field(line: bytes) -> bytes:
    return HEAD[:-2] + line + b"\r\n\r\n"


END = b"0\r\n\r\n"
GOOD = HEAD + b"".join(map(chunk, EVENTS)) + END
AGAIN = Script([GOOD])


def sent(
    server: RawServer, requests: int = 1, timeout_s: float = 5.0, due_s: tuple[float, ...] = ()
) -> list[RequestRow]:
    endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "m")
    return generate(LoadPlan(endpoint, 1, requests, 20, 3, 0, 256, 0, timeout_s, due_s=due_s)).requests


def one(script: Script, timeout_s: float = 5.0, due_s: tuple[float, ...] = ()) -> RequestRow:
    with raw_server(script) as server:
        return sent(server, timeout_s=timeout_s, due_s=due_s)[0]


BOTH_LOOPS = pytest.mark.parametrize("due_s", [(), (0.0,)], ids=["closed", "open"])


LOOKS_LIKE_THE_END = b": 0\r\n\r\n"
BODY = b"".join(EVENTS)


@BOTH_LOOPS
@pytest.mark.parametrize(
    ("script", "chunks"),
    [
        (Script([GOOD[i : i + 1] for i in range(len(GOOD))]), 3),
        (Script([GOOD]), 3),
        (Script([HEAD, *map(chunk, EVENTS), END], pause_s=0.01), 3),
        (Script([HEAD, chunk(LOOKS_LIKE_THE_END), *map(chunk, EVENTS), END], pause_s=0.02), 3),
        (Script([HEAD, *(chunk(e[:7]) + chunk(e[7:]) for e in EVENTS), END[:3], END[3:]], pause_s=0.01), 3),
        (Script([HEAD + b"".join(chunk(e.replace(b"\n", b"\r\n")) for e in EVENTS) + END]), 3),
        (Script([HEAD + b"".join(chunk(b": keep-alive\n\n") + chunk(e) for e in EVENTS) + END]), 3),
        (Script([HEAD + chunk(event(token("length"))) + b"".join(map(chunk, EVENTS[3:])) + END]), 1),
        (Script([GOOD[:-2] + b"Expires: 0\r\n\r\n"]), 3),
        (Script([b"HTTP/1.1 100 Continue\r\n\r\n", GOOD]), 3),
        (Script([b"HTTP/1.1 102 Processing\r\n\r\n" + GOOD]), 3),
        (Script([b"HTTP/1.1 100 C\r\n\r\n" * 2000 + GOOD]), 3),
        (Script([HEAD[i : i + 5] for i in range(0, len(HEAD), 5)] + [GOOD[len(HEAD) :]], pause_s=0.005), 3),
        (Script([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)]), 3),
        (Script([b"HTTP/1.0 200 OK\r\n\r\n" + BODY], then="close"), 3),
        (Script([with_field(b"Content-Encoding: gzip") + chunk(gzip.compress(BODY)) + END]), 3),
        (Script([HEAD.lower() + GOOD[len(HEAD) :]]), 3),
    ],
)  # fmt: skip
def test_a_whole_stream_is_a_success_however_it_is_written(
    script: Script, chunks: int, due_s: tuple[float, ...]
) -> None:
    row = one(script, due_s=due_s)
    assert (row.ok, row.failure_message, row.chunks, row.completion_tokens) == (True, None, chunks, 3)
    assert len(row.gaps_us) == chunks - 1
    assert row.first_byte_s is not None
    assert row.last_byte_s is not None
    assert row.ttft_s is not None
    assert 0 <= row.first_byte_s <= row.ttft_s <= row.last_byte_s


FEWER = event({"choices": [], "usage": USAGE | {"completion_tokens": 2}})
HTML = b"HTTP/1.1 200 OK\r\nContent-Type: text/html"


def with_event(at: int, *events: bytes) -> Script:
    changed = [*EVENTS[:at], *events, *EVENTS[at + 1 :]]
    return Script([HEAD + b"".join(chunk(e) for e in changed if e) + END])


UNFINISHED = b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"error": "no capa'
BROKEN_GZIP = with_field(b"Content-Encoding: gzip") + chunk(gzip.compress(BODY)[:20] + b"\xff" * 40) + END


def refusal(head: bytes, body: bytes = b"no room") -> Script:
    return Script([head + b"\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)])


@BOTH_LOOPS
@pytest.mark.parametrize(
    ("script", "expected", "words"),
    [
        (with_event(1, event({"error": {"message": "EngineCore died"}})), FailureClass.IN_BAND_ERROR, "died"),
        (with_event(4, b""), FailureClass.NO_DONE, "after 3 chunks"),
        (with_event(1, b""), None, ""),  # two chunks may hold the three tokens that usage counts
        (with_event(3, b""), FailureClass.NO_USAGE, "usage"),
        (with_event(3, FEWER), FailureClass.WRONG_TOKEN_COUNT, "2 completion tokens"),
        (with_event(3, FEWER, EVENTS[3]), None, ""),  # a usage with each chunk counts up
        (with_event(3, EVENTS[3], FEWER), FailureClass.MALFORMED_STREAM, "contradicts itself"),
        (with_event(2, EVENTS[2], EVENTS[2]), FailureClass.MALFORMED_STREAM, "twice"),
        (with_event(1, b"data: \xff\xfe\n\n"), FailureClass.MALFORMED_STREAM, "not a completions chunk"),
        (Script([HEAD + chunk(EVENTS[0]) + b"xyz\r\n"]), FailureClass.MALFORMED_STREAM, "its chunks make no sense"),
        (Script([HEAD + chunk(EVENTS[0])[:-2] + b"XX" + b"".join(map(chunk, EVENTS[1:])) + END]),
         FailureClass.MALFORMED_STREAM, "its chunks make no sense"),
        (Script([HEAD + chunk(EVENTS[0]) + b"5\r\nab"], then="reset"), FailureClass.CONNECTION_LOST, "after 1 chunks"),
        (Script([HEAD + chunk(EVENTS[0])], then="close"), FailureClass.CONNECTION_LOST, "after 1 chunks"),
        (Script([HEAD[:20]], then="close"), FailureClass.CONNECTION_LOST, "after 0 chunks"),
        (Script([], then="reset"), FailureClass.CONNECTION_LOST, "after 0 chunks"),
        (Script([HEAD + b"".join(map(chunk, EVENTS))]), FailureClass.TIMEOUT, "while streaming, after 3 chunks"),
        (Script([HEAD[:20]]), FailureClass.TIMEOUT, "while waiting for the answer's head, after 0 chunks"),
        (Script([HEAD]), FailureClass.TIMEOUT, "while waiting for the first chunk, after 0 chunks"),
        (Script([UNFINISHED], then="reset"), FailureClass.CONNECTION_LOST, 'the body begins: {"error": "no capa'),
        (Script([BROKEN_GZIP]), FailureClass.MALFORMED_STREAM, "Can not decode content-encoding"),
        (with_event(3, event(token()), EVENTS[3]), FailureClass.MALFORMED_STREAM, "after the finish_reason"),
        (Script([b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 2**17]), FailureClass.MALFORMED_STREAM, "not HTTP"),
        (Script([b"SSH-2.0\r\n\r\n"]), FailureClass.MALFORMED_STREAM, "not HTTP"),
        (refusal(b"HTTP/1.1 503 Unavailable"), FailureClass.HTTP_ERROR, "no room"),
        (refusal(b"HTTP/1.1 429 Too Many\r\nRetry-After: 7"), FailureClass.HTTP_ERROR, "no room (Retry-After: 7)"),
        (refusal(b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:9/"), FailureClass.HTTP_ERROR, "no room"),
        (refusal(HTML, b"<html>hello"), FailureClass.MALFORMED_STREAM, "<html>"),
        (Script([HEAD.replace(b"200 OK", b"500 Bad") + chunk(b"broken") + END]), FailureClass.HTTP_ERROR, "broken"),
    ],
)  # fmt: skip
def test_each_bad_answer_has_its_class_and_words(
    script: Script, expected: FailureClass | None, words: str, due_s: tuple[float, ...]
) -> None:
    row = one(script, timeout_s=0.6 if expected is FailureClass.TIMEOUT else 5.0, due_s=due_s)
    assert (row.failure_class, row.ok) == (expected, expected is None)
    assert words in (row.failure_message or "")


PLAIN = b"HTTP/1.1 200 OK\r\n\r\n"
LONG = b"data: " + b"x" * 2**18
CHATTER = event(token()) * 2000


@pytest.mark.parametrize(
    ("pieces", "begin"),
    [
        ([HEAD, *[chunk(LONG)] * 8], "40006\r\ndata: xxx"),  # one endless line
        ([PLAIN, *[LONG] * 8], "data: xxx"),
        ([HEAD, chunk(CHATTER)], 'data: {"choices"'),  # 2,000 tokens for the 3 that were asked for
        ([PLAIN, CHATTER], 'data: {"choices"'),
        ([HEAD + b"1" * 20] + [b"1" * 100] * 10_000, None),
    ],
)
def test_an_answer_longer_than_what_was_asked_for_is_given_up(pieces: list[bytes], begin: str | None) -> None:
    row = one(Script(pieces, then="close"))
    assert row.failure_class == FailureClass.MALFORMED_STREAM
    if begin is not None:
        assert "more than an answer of 3 tokens may take; the body begins: " in (row.failure_message or "")
        assert begin in (row.failure_message or "")
    assert row.body_bytes < most_bytes(3) + 2**18  # and what one read may hold
    assert row.last_byte_s is not None


def test_a_long_page_of_an_error_is_no_answer_that_is_too_long() -> None:
    row = one(refusal(b"HTTP/1.1 502 Bad Gateway", b"<html>no upstream" + b" " * 2**18))
    assert row.failure_class == FailureClass.HTTP_ERROR
    assert (row.failure_message or "").startswith("HTTP 502: <html>no upstream")


@pytest.mark.parametrize("head", [HEAD, PLAIN])
async def test_of_an_answer_that_is_given_up_no_more_than_its_begin_is_kept(head: bytes) -> None:
    """A level may have thousands of these, and all are kept until its window has closed."""
    with raw_server(Script([head, *[chunk(LONG) if head is HEAD else LONG for _ in range(8)]], then="close")) as server:
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "m")
        async with open_session(endpoint) as session:
            line = wire.Line(wire.Wire(session, endpoint.load_url(Api.COMPLETIONS), None), keepalive_s=1.0)
            answer = wire.Answer(0.0, 2**17)
            with pytest.raises(aiohttp.ClientPayloadError, match="longer than an answer may be"):
                await line.post(b"{}", answer)
    assert sum(map(len, answer.reads.data)) == BEGIN_BYTES
    assert 2**17 < answer.reads.size < 2**19


async def taken(most: float, pieces: Iterable[bytes]) -> tuple[wire.Answer, asyncio.Future[None]]:
    """An answer that comes in these reads, as far as it is taken."""
    tap = wire.Tap(asyncio.get_running_loop())
    tap.transport = Mock(spec=asyncio.Transport)
    answer = wire.Answer(0.0, most)
    ended = tap.ask(b"", answer)
    for piece in pieces:
        tap.data_received(piece)
        if ended.done():
            break
    assert tap.transport.abort.call_count == (ended.done() and ended.exception() is not None)
    return answer, ended


def split(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def held(reads: Reads) -> int:
    return sum(map(len, reads.data)) + BYTES_A_READ * len(reads.data)


async def test_reads_of_few_bytes_count_with_what_they_take() -> None:
    """Where each ends a line, none can be merged."""
    pieces = split(chunk(b":\n" * 2**14), 2)
    answer, ended = await taken(2**16, [HEAD, *pieces])
    assert isinstance(ended.exception(), aiohttp.ClientPayloadError)
    assert 2**16 < answer.reads.size * (BYTES_A_READ + 2) // 2 < 2**16 + 300


VLLMS = (
    b'{"id":"cmpl-8d2b1f0c9a7e4d35a1b2c3d4e5f60718","object":"text_completion","created":1795567241,"model":"m",'
    b'"choices":[{"index":0,"text":" 8081","logprobs":null,"finish_reason":%b,"stop_reason":null,"token_ids":null,'
    b'"prompt_logprobs":null,"prompt_token_ids":null}],"usage":null}'
)
SIXTY_FOUR = [
    *[event(VLLMS % b"null")] * 63,
    event(VLLMS % b'"length"'),
    event({"choices": [], "usage": USAGE | {"completion_tokens": 64}}),
    event(b"[DONE]"),
]
ENDS = {"lf": SIXTY_FOUR, "crlf": [each.replace(b"\n", b"\r\n") for each in SIXTY_FOUR]}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("events", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("chunk_bytes", [None, 1, 7])
async def test_an_answer_in_pieces_of_a_few_bytes_is_a_success_with_the_stamps_of_its_reads(
    size: int, events: list[bytes], chunk_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server wrote HTTP's chunks of a few bytes."""
    monkeypatch.setattr(wire, "monotonic", map(float, itertools.count()).__next__)
    pieces = split(
        b"".join(chunk(part) for each in events for part in split(each, chunk_bytes or len(each))) + END, size
    )
    most = most_bytes(64)
    answer, ended = await taken(most, [HEAD, *pieces])
    assert ended.done()
    assert held(answer.reads) <= most
    assert (answer.first_byte_s, answer.reads.at_s[0], answer.reads.at_s[-1]) == (0.0, 1.0, len(pieces))
    assert b"".join(answer.reads.data) == b"".join(pieces)
    record, each_read = digest(answer.reads), Reads(pieces, [float(at) for at in range(1, len(pieces) + 1)], True)
    assert record == digest(each_read)
    assert len(record.chunk_at_s) == 64
    assert judge(record, Asked(64, ignore_eos=True, prompt_tokens=20)) is None


def test_so_is_one_that_a_server_writes_so() -> None:
    for head in (HEAD, PLAIN):
        body = b"".join(map(chunk, SIXTY_FOUR)) + END if head is HEAD else b"".join(SIXTY_FOUR)
        with raw_server(Script([head, *split(body, 1)], then="close")) as server:
            endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "m")
            (row,) = generate(LoadPlan(endpoint, 1, 1, 20, 64, 0, 256, 0, 20.0)).requests
        assert (row.failure_message, row.chunks, row.body_bytes) == (None, 64, len(body))


async def test_a_line_without_an_end_is_given_up_however_it_comes() -> None:
    """In bounded memory, and in a time that its length alone decides."""
    most = most_bytes(64)
    for size in (1, 7, 2**16):
        parts = (b"x" * size for _ in range(10**8 // size))
        answer, ended = await taken(most, itertools.chain([HEAD, b"5f5e100\r\ndata: "], parts))
        assert isinstance(ended.exception(), aiohttp.ClientPayloadError)
        assert 0.9 * most < answer.reads.size < most + size
        assert held(answer.reads) == BEGIN_BYTES + BYTES_A_READ


def test_one_connection_is_used_again_after_a_whole_answer() -> None:
    with raw_server(AGAIN) as server:
        assert all(row.ok for row in sent(server, 5))
        assert server.connections == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Script([with_field(b"Connection: close") + GOOD[len(HEAD) :]], then="close"), None),
        (Script([GOOD + b"HTTP/1.1 200 OK\r\n\r\n"]), None),
        # Closed without a word while the next request is on its way: that one is lost, and not sent again.
        (Script([GOOD], pause_s=0.1, then="close"), FailureClass.CONNECTION_LOST),
    ],
)
def test_a_connection_that_is_spent_is_replaced_before_the_next_request(
    first: Script, second: FailureClass | None
) -> None:
    with raw_server(first, AGAIN) as server:
        rows = sent(server, 3)
    assert [row.failure_class for row in rows] == [None, second, None]
    assert server.connections == 2


async def test_a_connection_that_ended_while_it_was_idle_is_replaced() -> None:
    with raw_server(Script([GOOD], then="close"), AGAIN) as server, contextlib.ExitStack() as closing:
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "m")
        async with open_session(endpoint) as session:
            line = wire.Line(wire.Wire(session, endpoint.load_url(Api.COMPLETIONS), None), keepalive_s=60.0)
            closing.callback(line.close)
            for _ in range(2):
                answer = wire.Answer(0.0)
                await line.post(b"{}", answer)
                await asyncio.sleep(0.1)
                assert answer.status == 200
        assert server.connections == 2


def test_the_request_is_written_as_http_has_it() -> None:
    with raw_server(AGAIN) as server:
        sent(server)
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/completions HTTP/1.1"
    fields = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines[1:])}
    assert fields[b"host"] == f"127.0.0.1:{server.port}".encode()
    assert (fields[b"content-type"], fields[b"accept-encoding"]) == (b"application/json", b"identity")
    assert int(fields[b"content-length"]) == len(body)
    assert len(lines) == len(fields) + 1
    assert json.loads(body)["max_tokens"] == 3


PIECES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([HEAD, HEAD[:30], GOOD, END, b"\r\n", b"0\r\n", *map(chunk, EVENTS), b"HTTP/1.1 100 C\r\n\r\n"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PIECES, max_size=8), st.lists(st.integers(0, 2000), max_size=4), st.sampled_from(["close", "reset"]))
def test_whatever_is_written_the_request_ends_with_a_verdict(pieces: list[bytes], cuts: list[int], then: str) -> None:
    data = b"".join(pieces)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    row = one(Script([data[a:b] for a, b in pairwise(edges)], then=then))
    if row.ok:
        assert (row.completion_tokens, row.finish_reason, row.http_status) == (3, "length", 200)
    else:
        assert row.failure_class in (
            FailureClass.CONNECTION_LOST, FailureClass.MALFORMED_STREAM, FailureClass.NO_DONE,
            FailureClass.NO_FINISH_REASON, FailureClass.NO_USAGE, FailureClass.WRONG_TOKEN_COUNT,
        )  # fmt: skip
        assert row.failure_message


ANSWERS = st.one_of(
    PIECES,
    st.sampled_from(
        [b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", b"HTTP/1.1 204 None\r\n\r\n",
         b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY), HEAD + chunk(b"nonsense") + END,
         b"HTTP/1.1 500 Bad\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"broken") + END, BODY]
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ANSWERS, min_size=1, max_size=4))
@example([GOOD, b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"])
@example([HEAD + chunk(b"nonsense") + END])
def test_whatever_is_written_the_next_request_on_that_line_is_answered(pieces: list[bytes]) -> None:
    """On the same connection or a new one: nothing that an answer left behind is taken for the next one's."""

    async def second_after_it(server: RawServer) -> wire.Answer:
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "m")
        async with open_session(endpoint) as session:
            line = wire.Line(wire.Wire(session, endpoint.load_url(Api.COMPLETIONS), None), keepalive_s=60.0)
            first = asyncio.ensure_future(line.post(b"{}", wire.Answer(0.0, most_bytes(3))))
            async with asyncio.timeout(5):
                while not server.requests and not first.done():  # noqa: ASYNC110 - a thread's; the second must not overtake
                    await asyncio.sleep(0.001)
            with contextlib.suppress(aiohttp.ClientError, HttpProcessingError, OSError):
                async with asyncio.timeout(0.03):  # for what has no end
                    await first
            answer = wire.Answer(0.0, most_bytes(3))
            async with asyncio.timeout(5):
                await line.post(b"{}", answer)
            line.close()
            return answer

    with raw_server(Script([b"".join(pieces)]), AGAIN) as server:
        answer = uvloop.run(second_after_it(server))
    assert answer.status == 200
    assert judge(digest(answer.reads), Asked(3, ignore_eos=True, prompt_tokens=20)) is None


async def test_a_line_that_waits_unused_for_the_start_keeps_its_connection() -> None:
    with raw_server(AGAIN) as server:
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "m")
        async with open_session(endpoint) as session:
            line = wire.Line(wire.Wire(session, endpoint.load_url(Api.COMPLETIONS), None), keepalive_s=0.0)
            await line.open()
            await line.open()
            answer = wire.Answer(0.0)
            await line.post(b"{}", answer)
            assert (answer.status, server.connections) == (200, 1)
            await line.post(b"{}", wire.Answer(0.0))  # now it has been idle for longer than it may
            assert server.connections == 2
            line.close()


def test_a_proxy_is_asked_with_the_whole_url_and_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(AGAIN) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:word@127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        endpoint = Endpoint("http://model.invalid:8000", "m", api_key="key")
        rows = generate(LoadPlan(endpoint, 1, 2, 20, 3, 0, 256, 0, 5.0)).requests
    assert [row.failure_message for row in rows] == [None, None]
    for request in proxy.requests:
        lines = request.partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert lines[0] == b"POST http://model.invalid:8000/v1/completions HTTP/1.1"
        assert b"Host: model.invalid:8000" in lines
        assert b"Authorization: Bearer key" in lines
        assert b"Proxy-Authorization: Basic dXNlcjp3b3Jk" in lines


def test_a_proxy_that_refuses_a_tunnel_is_a_connection_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(refusal(b"HTTP/1.1 407 Proxy Authentication Required")) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        endpoint = Endpoint("https://model.invalid", "m")
        (row,) = generate(LoadPlan(endpoint, 1, 1, 20, 3, 0, 256, 0, 5.0)).requests
    assert row.failure_class == FailureClass.CONNECTION_FAILED
    assert "407" in (row.failure_message or "")
    assert proxy.requests[0].startswith(b"CONNECT model.invalid:443 ")


def tls_for(name: str, directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return a server's side for `name`, and the side of a client that trusts it."""
    authority, ours, theirs = trustme.CA(), ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(theirs)
    authority.configure_trust(ours)
    return theirs, ours


def test_a_tunnel_through_a_proxy_serves_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs, ours = tls_for("model.invalid", tmp_path)
    with serving(MockOpenAI(tls=theirs)) as server, tunnel(int(server.url.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", ours)
        endpoint = Endpoint("https://model.invalid", "mock")
        rows = generate(LoadPlan(endpoint, 2, 6, 20, 3, 0, 256, 0, 5.0)).requests
    assert [row.failure_message for row in rows] == [None] * 6
    assert len(proxy.requests) == 2  # one for each line, which then is used again
    assert all(request.startswith(b"CONNECT model.invalid:443 ") for request in proxy.requests)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 loopback here")
def test_ipv6_serves_as_well() -> None:
    with raw_server(AGAIN, host="::1") as server:
        endpoint = Endpoint(f"http://[::1]:{server.port}", "m")
        rows = generate(LoadPlan(endpoint, 1, 2, 20, 3, 0, 256, 0, 5.0)).requests
    assert [row.failure_message for row in rows] == [None, None]
    assert b"\r\nHost: [::1]:%d\r\n" % server.port in server.requests[0]


def test_a_server_that_does_not_accept_is_named_in_the_phase() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        taken = [socket.socket() for _ in range(3)]
        for each in taken:  # until the backlog is full: from then on nobody gets an answer to a connect
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        (row,) = generate(LoadPlan(Endpoint(f"http://127.0.0.1:{port}", "m"), 1, 1, 20, 3, 0, 256, 0, 0.2)).requests
        for each in taken:
            each.close()
    assert (row.failure_class, row.failure_message) == (
        FailureClass.TIMEOUT, "no end within 0.2 s, while connecting, after 0 chunks",
    )  # fmt: skip


def test_a_failed_connection_is_told_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = generate(LoadPlan(Endpoint("http://127.0.0.1:9", "m"), 1, 1, 20, 3, 0, 256, 0, 5.0)).requests
    assert row.failure_class == FailureClass.CONNECTION_FAILED
    assert (row.failure_message or "").startswith("Cannot connect to host 127.0.0.1:9 [")


def test_no_file_left_for_a_connection_is_the_clients_limit() -> None:
    assert "the client's limit" in in_words(OSError(errno.EMFILE, "Too many open files"))
