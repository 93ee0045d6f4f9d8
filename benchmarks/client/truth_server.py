"""A server whose truth is known: every stream's tokens are due on a schedule, and the times of their writes are logged.

    truth_server.py PORT_FILE TRUTH_FILE CORE INTERVAL_MS [PORT]

Listens on a free loopback port, written to PORT_FILE, or beside others of its kind on PORT. A request is a POST of any
path whose body names `max_tokens`; its first token is due one interval after it has been read, each further one an
interval later. At SIGTERM the truth goes to TRUTH_FILE as JSON: of every request
`[read, [write, write, ...], crc, arrived]`, seconds on the monotonic clock that all processes of a host share, and the
CRC-32 of its body, by which whoever sent it knows it again. `arrived` is the kernel's stamp of its last byte
(SO_TIMESTAMPNS), the same whether this process came to read it or stood still. One thread on raw epoll, standard
library only, pinned to CORE.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Wed, 25 Nov 2026 00:00:00 GMT\r\nserver: truth\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT = (
    'data: {"id":"cmpl-8d2b1f0c9a7e4d35","object":"text_completion","created":1795567241,"model":"truth","choices":'
    '[{"index":0,"text":" 8081","logprobs":null,"finish_reason":%s,"stop_reason":null,"token_ids":null,'
    '"prompt_logprobs":null,"prompt_token_ids":null}],"usage":null}\n\n'
)
USAGE = (
    'data: {"id":"cmpl-8d2b1f0c9a7e4d35","object":"text_completion","created":1795567241,"model":"truth","choices":[],'
    '"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d}}\n\n'
)


def chunk(body: str) -> bytes:
    """Return a body as one HTTP chunk."""
    data = body.encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN, LAST = chunk(EVENT % "null"), chunk(EVENT % '"length"')
STAMPED = getattr(socket, "SO_TIMESTAMPNS", 35)
DONE = chunk("data: [DONE]\n\n") + b"0\r\n\r\n"
MODELS = json.dumps({"object": "list", "data": [{"id": "truth", "object": "model", "max_model_len": 10**6}]}).encode()


@dataclass(slots=True)
class Connection:
    """One client connection and the stream that runs on it."""

    socket: socket.socket
    received: bytes = b""
    writes: list[float] = field(default_factory=list)
    left: int = 0
    tokens: int = 0
    prompt: int = 0


class Server:
    """See the module."""

    def __init__(self, interval_s: float, port: int = 0) -> None:
        self.interval_s = interval_s
        self.listener = socket.create_server(("127.0.0.1", port), backlog=4096, reuse_port=True)
        self.listener.setblocking(False)
        self.listener.setsockopt(socket.SOL_SOCKET, STAMPED, 1)  # its connections inherit it
        self.poll = select.epoll()
        self.poll.register(self.listener, select.EPOLLIN)
        self.connections: dict[int, Connection] = {}
        self.due: list[tuple[float, int, Connection]] = []
        self.truth: list[tuple[float, list[float], int, float]] = []
        self.order = 0

    def serve(self, stopped: list[int]) -> None:
        """Run until a signal has come."""
        while not stopped:
            now = time.monotonic()
            while self.due and self.due[0][0] <= now:
                at, _, connection = heapq.heappop(self.due)
                self._write(connection, at)
                now = time.monotonic()
            wait = min(self.due[0][0] - now, 0.2) if self.due else 0.2
            for number, _ in self.poll.poll(max(wait, 0), 64):
                if number == self.listener.fileno():
                    self._accept()
                else:
                    self._read(self.connections[number])

    def _accept(self) -> None:
        try:
            client, _ = self.listener.accept()
        except BlockingIOError:
            return
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections[client.fileno()] = Connection(client)
        self.poll.register(client, select.EPOLLIN)

    def _read(self, connection: Connection) -> None:
        try:
            data, stamps, _, _ = connection.socket.recvmsg(2**18, socket.CMSG_SPACE(16))
        except BlockingIOError:
            return
        except ConnectionError:
            data, stamps = b"", []
        if not data:
            del self.connections[connection.socket.fileno()]
            self.poll.unregister(connection.socket)
            connection.socket.close()
            connection.left = 0
            return
        connection.received += data
        head, found, body = connection.received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head.lower())
        if not found or len(body) < (int(length[1]) if length else 0):
            return
        connection.received = b""
        if head.startswith(b"GET"):
            answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            connection.socket.send(answer % (len(MODELS), MODELS))
            return
        asked = re.search(rb'"max_tokens": *(\d+)', body)
        connection.left = connection.tokens = int(asked[1]) if asked else 1
        connection.prompt = body.partition(b'"prompt":')[2].partition(b"]")[0].count(b",") + 1
        connection.writes = []
        now = time.monotonic()
        self.truth.append((now, connection.writes, zlib.crc32(body), now - _age_s(stamps)))
        self._schedule(connection, now + self.interval_s)

    def _schedule(self, connection: Connection, at: float) -> None:
        self.order += 1
        heapq.heappush(self.due, (at, self.order, connection))

    def _write(self, connection: Connection, at: float) -> None:
        if not connection.left:
            return
        first = connection.left == connection.tokens
        connection.left -= 1
        data = (HEAD if first else b"") + (TOKEN if connection.left else LAST)
        if not connection.left:
            total = connection.prompt + connection.tokens
            data += chunk(USAGE % (connection.prompt, total, connection.tokens)) + DONE
        connection.writes.append(time.monotonic())
        try:
            connection.socket.send(data)
        except OSError:
            connection.left = 0
        if connection.left:
            self._schedule(connection, at + self.interval_s)


def _age_s(stamps: list[tuple[int, int, bytes]]) -> float:
    """Return how long ago the kernel had the last byte of what was read just now."""
    ((_, _, stamp),) = stamps
    seconds, nanoseconds = struct.unpack("qq", stamp)
    return time.time() - seconds - nanoseconds / 1e9


def main(arguments: list[str]) -> None:
    """Entry of the process."""
    port_file, truth_file, core = Path(arguments[0]), Path(arguments[1]), int(arguments[2])
    os.sched_setaffinity(0, {core})
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    server = Server(float(arguments[3]) / 1000, *map(int, arguments[4:]))
    port_file.write_text(str(server.listener.getsockname()[1]))
    server.serve(stopped)
    truth_file.write_text(json.dumps(server.truth))


if __name__ == "__main__":
    main(sys.argv[1:])
