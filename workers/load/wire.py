"""One request over one connection: bytes of a streamed answer are stamped and kept where they arrive, and nothing else.

aiohttp carries the connections (pool, keep-alive, TLS, proxies, Unix sockets), makes the headers and parses every head.
A request is written in one piece, prepared before the measured window. The body of a chunked 200 never goes through
aiohttp's parser: `Tap` keeps each read with its stamp, and when the last chunk has come it hands aiohttp an empty body,
which ends the answer. De-chunking, events and verdicts happen later, from the kept reads (`workers.load.stream`).

aiohttp's own `session.post` costs some 200 µs a request, and its body reader 10 µs a token, at the very moments when
hundreds of streams begin together or are due (`benchmarks/client/`).
"""

from __future__ import annotations

import asyncio
import functools
import time
from dataclasses import dataclass, field

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.helpers import strip_auth_from_url
from yarl import URL

from workers.load.chunks import ChunkReader
from workers.load.reads import Reads

MAX_BODY_BYTES = 64 * 2**20
"""A longer answer is given up: no completions stream is so long."""
MAX_HEAD_BYTES = 2**16
_END_OF_HEAD = b"\r\n\r\n"
_EMPTY_BODY = b"0\r\n\r\n"


class Tap(ResponseHandler):
    """aiohttp's protocol of one connection, which takes the body of a chunked 200 aside into the answer's reads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._answer: Answer | None = None
        self._head = b""
        self._capturing = False
        self._passing = False
        self._bytes = 0
        self._chunks = ChunkReader()
        self._unread = 0

    def expect(self, answer: Answer) -> None:
        """Take what comes next as the answer to the request that is about to be sent."""
        self._answer = answer
        self._head, self._capturing, self._passing = b"", False, False

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with whatever one read gave."""
        if not self._capturing:
            self._take_head(data)
            return
        assert self._answer is not None
        reads = self._answer.reads
        reads.at_s.append(time.monotonic())
        reads.data.append(data)
        self._bytes += len(data)
        # Only such reads can hold the last chunk's end; a stream's ordinary reads are not walked one by one.
        if _END_OF_HEAD in data or len(data) < len(_END_OF_HEAD):
            self._look_for_end()
        if self._bytes > MAX_BODY_BYTES and self._capturing and self.transport is not None:
            self.transport.abort()

    def _take_head(self, data: bytes) -> None:
        answer = self._answer
        if answer is not None and answer.first_byte_s is None:
            answer.first_byte_s = time.monotonic()
        if self._passing or answer is None:
            super().data_received(data)
            return
        head = self._head + data
        end = head.find(_END_OF_HEAD)
        if end < 0 and len(head) <= MAX_HEAD_BYTES:
            self._head = head
            return
        self._head = b""
        if end < 0:
            self._passing = True
            super().data_received(head)
            return
        cut = end + len(_END_OF_HEAD)
        if _is_interim(head):
            super().data_received(head[:cut])
            if cut < len(head):
                self._take_head(head[cut:])
        elif _is_stream(head[:cut]):
            self._capturing, self._bytes, self._unread = True, 0, 0
            self._chunks = ChunkReader()
            answer.reads.chunked = True
            super().data_received(head[:cut])
            if cut < len(head):
                self.data_received(head[cut:])
        else:
            self._passing = True
            super().data_received(head)

    def _look_for_end(self) -> None:
        assert self._answer is not None
        kept, chunks = self._answer.reads.data, self._chunks
        chunks.feed(b"".join(kept[self._unread :]))
        self._unread = len(kept)
        if not chunks.ended:
            return
        self._capturing, self._answer = False, None
        super().data_received(_EMPTY_BODY)
        if chunks.behind:  # bytes that nobody asked for: aiohttp will not use the connection again
            self._passing = True
            super().data_received(chunks.behind)


def _is_interim(head: bytes) -> bool:
    return head[9:10] == b"1"


def _is_stream(head: bytes) -> bool:
    status = head.split(b" ", 2)[1:2]
    fields = head.lower()
    return (
        status == [b"200"]
        and b"\r\ntransfer-encoding: chunked\r\n" in fields
        and b"\r\ncontent-encoding:" not in fields
    )


@dataclass(slots=True)
class Answer:
    """What came back for one request. `reads` holds the body of an answer that is HTTP, whatever its status."""

    sent_s: float
    status: int | None = None
    first_byte_s: float | None = None
    reads: Reads = field(default_factory=Reads)


class Wire:
    """A way to one URL that requests are written to. Made in a running loop, with an open session."""

    def __init__(self, session: aiohttp.ClientSession, url: str, proxy: str | None) -> None:
        assert session.connector is not None
        self._connector = _tapped(session.connector)
        target, credentials = strip_auth_from_url(URL(proxy)) if proxy else (None, None)
        self._request = aiohttp.ClientRequest(
            "POST", URL(url), headers={**session.headers, "Content-Type": "application/json"}, session=session,
            loop=asyncio.get_running_loop(), proxy=target, proxy_auth=credentials,
        )  # fmt: skip
        self._head = self._written_head() if target is None else None

    def _written_head(self) -> bytes:
        """The head as it is written, up to the length of the body."""
        url = self._request.url
        whole = self._request.proxy is not None and url.scheme == "http"
        lines = [f"POST {url if whole else url.raw_path_qs} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self._request.headers.items() if name != "Content-Length"]
        return "\r\n".join([*lines, "Content-Length: "]).encode()

    async def post(self, body: bytes, answer: Answer) -> None:
        """Send `body` and fill `answer` as the bytes come; returns at the end of the answer.

        Raises what aiohttp raises where a connection cannot be made, is lost, or does not speak HTTP; `answer` then
        holds what had come before. Cancelling it closes the connection.
        """
        connection = await self._connector.connect(self._request, [], _NO_LIMIT)
        tap = connection.protocol
        assert isinstance(tap, Tap)
        try:
            tap.expect(answer)
            tap.set_response_params(read_until_eof=True, auto_decompress=True, read_bufsize=2**16)
            # A proxy's headers are known once it has been connected to.
            head = self._head or self._written_head()
            assert tap.transport is not None
            tap.transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))
            message, payload = await tap.read()
            while 100 <= message.code < 200:
                message, payload = await tap.read()
            answer.status = message.code
            if answer.reads.chunked:
                await payload.read()
            else:
                kept = 0
                async for data in payload.iter_any():
                    kept += len(data)
                    if kept <= MAX_BODY_BYTES:
                        answer.reads.at_s.append(time.monotonic())
                        answer.reads.data.append(data)
        except BaseException:
            connection.close()
            raise
        connection.release()


_NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_connect=None)


def _tapped(connector: aiohttp.BaseConnector) -> aiohttp.BaseConnector:
    """Return the connector with `Tap` as the protocol of its connections."""
    made_by = getattr(connector, "_factory", None)
    if not isinstance(made_by, functools.partial) or made_by.func not in (ResponseHandler, Tap):
        raise RuntimeError(f"aiohttp {aiohttp.__version__} makes its connections' protocols in a way not known here")
    connector._factory = functools.partial(Tap, **made_by.keywords)  # type: ignore[assignment]
    return connector
