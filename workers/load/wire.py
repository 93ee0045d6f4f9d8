"""One request over one connection: bytes of a streamed answer are stamped and kept where they arrive, and nothing else.

aiohttp makes the connections (TLS, proxies, Unix sockets, names), the headers, and reads every answer that is not
the stream that was asked for. A request is written in one piece, prepared before the measured window. Of a chunked 200
`Tap` keeps reads with their stamps and only looks for the end; chunks, events and verdicts come later, from the kept
reads (`workers.load.stream`).

Through `aiohttp.ClientSession` a request costs some 200 µs and a token 10 µs, at the very moments when hundreds of
streams begin together or have tokens due (`benchmarks/client/`).
"""

from __future__ import annotations

import asyncio
import functools
import math
from dataclasses import dataclass, field
from time import monotonic

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.helpers import strip_auth_from_url
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from workers.load.chunks import ChunkReader
from workers.load.reads import BYTES_A_READ, Reads, Room

MAX_HEAD_BYTES = 2**16
_END_OF_HEAD = b"\r\n\r\n"
_NO_LIMIT = aiohttp.ClientTimeout(total=None, sock_connect=None)


@dataclass(slots=True)
class Answer:
    """What came back for one request. `reads` holds the body of an answer that is HTTP, whatever its status."""

    sent_s: float
    most_bytes: float = math.inf
    """What `reads` may take, `BYTES_A_READ` for each included; a body that takes more is given up."""
    asked: bool = False
    """Whether there was a connection to write the request to."""
    status: int | None = None
    first_byte_s: float | None = None
    retry_after: str | None = None
    """What the server said of when to come again, where it did not answer with a stream."""
    reads: Reads = field(default_factory=Reads)


class Tap(ResponseHandler):
    """aiohttp's protocol of one connection, which keeps the stream that answers a request and leaves it the rest.

    `ask` writes a request; its future is done when the stream is whole, or when aiohttp has been given an answer that
    is no stream (`passing`).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.passing = False
        self._ended: asyncio.Future[None] | None = None
        self._answer = Answer(0.0)
        self._reads = self._answer.reads
        self._head = b""
        self._capturing = False
        self._room = 0.0
        self._more: Room | None = None
        self._chunks = ChunkReader()

    def ask(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        """Write a request whose answer goes into `answer`."""
        self._answer, self._head, self._capturing, self.passing = answer, b"", False, False
        self._reads, self._room, self._more = answer.reads, 0.0, None
        self._ended = self._loop.create_future()
        if self.transport is None:
            raise aiohttp.ServerDisconnectedError
        self.transport.write(request)
        answer.asked = True
        return self._ended

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with whatever one read gave."""
        if not self._capturing:
            self._take_head(data)
            return
        reads = self._reads
        reads.at_s.append(monotonic())
        reads.data.append(data)
        self._room = room = self._room - (len(data) + BYTES_A_READ)
        if self._chunks.skip(data):
            self._take_end()
        elif room < 0:
            self._make_room()

    def _make_room(self) -> None:
        if self._more is None:
            self._more = Room(self._reads, self._answer.most_bytes)
        self._room = self._more.more(self._room)
        if self._room < 0:
            self._reads.give_up()
            self._give_up(_too_long())

    def _take_end(self) -> None:
        self._capturing = False
        if self._chunks.broken:
            self._give_up(HttpProcessingError(message="its chunks make no sense"))
            return
        if self._chunks.behind:  # bytes that nobody asked for
            self.force_close()
        self._end()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Called by the event loop when the connection has ended, however it did."""
        super().connection_lost(exc)
        self._end(aiohttp.ClientOSError(*exc.args) if isinstance(exc, OSError) else aiohttp.ServerDisconnectedError())

    def _give_up(self, error: Exception) -> None:
        self._end(error)
        if self.transport is not None:
            self.transport.abort()

    def _take_head(self, data: bytes) -> None:
        if self.passing or self._ended is None:
            super().data_received(data)
            return
        if self._answer.first_byte_s is None:
            self._answer.first_byte_s = monotonic()
        self._head += data
        head, rest = _head_of(self._head)
        while head[9:10] == b"1":  # an interim answer, of which more is to come
            self._head = rest
            head, rest = _head_of(rest)
        if not head:
            if len(self._head) > MAX_HEAD_BYTES:
                self._pass_on()
        elif _is_stream(head):
            self._answer.status, self._reads.chunked = 200, True
            self._head, self._capturing, self._chunks = b"", True, ChunkReader()
            if b"\r\nconnection: close\r\n" in head:
                self.force_close()
            if rest:
                self.data_received(rest)
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        self.passing = True
        self.set_response_params(read_until_eof=True, auto_decompress=True, read_bufsize=2**16)
        head, self._head = self._head, b""
        super().data_received(head)
        self._end()

    def _end(self, error: Exception | None = None) -> None:
        """Tell whoever asked, once, that the answer is at its end or has failed."""
        if self._ended is not None and not self._ended.done():
            if error is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(error)
        self._ended = None


def _head_of(data: bytes) -> tuple[bytes, bytes]:
    """The whole head that `data` begins with, in lower case, and what is behind it; nothing where it is not whole."""
    end = data.find(_END_OF_HEAD) + len(_END_OF_HEAD)
    return (b"", data) if end < len(_END_OF_HEAD) else (data[:end].lower(), data[end:])


def _is_stream(head: bytes) -> bool:
    return (
        head[:13] == b"http/1.1 200 "
        and b"\r\ntransfer-encoding: chunked\r\n" in head
        and b"\r\ncontent-encoding:" not in head
    )


def _too_long() -> aiohttp.ClientPayloadError:
    return aiohttp.ClientPayloadError("longer than an answer may be")


class Wire:
    """A way to one URL. Made in a running loop, with an open session, whose connector it takes over."""

    def __init__(self, session: aiohttp.ClientSession, url: str, proxy: str | None) -> None:
        assert session.connector is not None
        self._connector = _tapped(session.connector)
        target, credentials = strip_auth_from_url(URL(proxy)) if proxy else (None, None)
        self._request = aiohttp.ClientRequest(
            "POST", URL(url), headers={**session.headers, "Content-Type": "application/json"}, session=session,
            loop=asyncio.get_running_loop(), proxy=target, proxy_auth=credentials,
        )  # fmt: skip

    async def connect(self) -> aiohttp.connector.Connection:
        """Return a new connection. Raises aiohttp's exceptions and `OSError`."""
        return await self._connector.connect(self._request, [], _NO_LIMIT)

    def head(self) -> bytes:
        """Return a request's head up to the length of its body; where there is a proxy, only once connected to it."""
        url = self._request.url
        whole = self._request.proxy is not None and url.scheme == "http"
        lines = [f"POST {url if whole else url.raw_path_qs} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in self._request.headers.items() if name != "Content-Length"]
        return "\r\n".join([*lines, "Content-Length: "]).encode()


class Line:
    """One request after the other over a connection of its own, which is made anew when it has ended."""

    def __init__(self, wire: Wire, keepalive_s: float) -> None:
        self._wire, self._keepalive_s = wire, keepalive_s
        self._connection: aiohttp.connector.Connection | None = None
        self._head = b""
        self._idle_since = 0.0
        self.busy = False
        """Whether a request is in flight on it."""

    def another(self) -> Line:
        """Return a further line of the same kind, not yet connected."""
        return Line(self._wire, self._keepalive_s)

    async def open(self) -> None:
        """Connect, if there is no connection that can be used."""
        if self._connection is not None:
            tap = self._connection.protocol
            if tap is not None and tap.is_connected() and monotonic() - self._idle_since < self._keepalive_s:
                return
            self.close()
        self._connection = await self._wire.connect()
        # One that was never used has nothing to be kept alive from: servers begin to count with their first answer.
        self._head, self._idle_since = self._wire.head(), math.inf

    def close(self) -> None:
        """Let go of the connection; the server aborts what runs on it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def post(self, body: bytes, answer: Answer) -> None:
        """Send `body` and fill `answer` as the bytes come; returns at the end of the answer.

        Raises what aiohttp raises where a connection cannot be made, is lost, or does not speak HTTP; `answer` then
        holds what had come before. Cancelling it closes the connection.
        """
        self.busy = True
        try:
            await self._post(body, answer)
        finally:
            self.busy = False

    async def _post(self, body: bytes, answer: Answer) -> None:
        await self.open()
        assert self._connection is not None
        tap = self._connection.protocol
        assert isinstance(tap, Tap)
        try:
            await tap.ask(b"%b%d\r\n\r\n%b" % (self._head, len(body), body), answer)
            if tap.passing:
                await _read_with_aiohttp(tap, answer)
        except BaseException:
            self.close()
            raise
        if tap.should_close:
            self.close()
        self._idle_since = monotonic()


async def _read_with_aiohttp(tap: Tap, answer: Answer) -> None:
    message, payload = await tap.read()
    answer.status, answer.retry_after = message.code, message.headers.get("Retry-After")
    more = Room(answer.reads, answer.most_bytes)
    room = more.more()
    async for data in payload.iter_any():
        answer.reads.at_s.append(monotonic())
        answer.reads.data.append(data)
        room -= len(data) + BYTES_A_READ
        if room < 0:
            room = more.more(room)
        if room < 0:
            answer.reads.give_up()
            raise _too_long()


def _tapped(connector: aiohttp.BaseConnector) -> aiohttp.BaseConnector:
    """Return the connector with `Tap` as the protocol of its connections."""
    made_by = getattr(connector, "_factory", None)
    if not isinstance(made_by, functools.partial) or made_by.func not in (ResponseHandler, Tap):
        raise RuntimeError(f"aiohttp {aiohttp.__version__} makes its connections' protocols in a way not known here")
    connector._factory = functools.partial(Tap, **made_by.keywords)  # type: ignore[assignment]
    return connector
