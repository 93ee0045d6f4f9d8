"""A server that writes exactly the bytes it is told to, whatever HTTP says: for clients that must stand anything."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Script:
    """How one request is answered."""

    pieces: list[bytes]
    pause_s: float = 0.0
    """Between two pieces."""
    then: str = "keep"
    """`keep` the connection open, `close` it, `reset` it, or stay `silent` with the answer unfinished."""


@dataclass
class RawServer:
    """Answers requests by `scripts`, one after the other; the last one is used again and again."""

    scripts: list[Script]
    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    """When each had been read (`time.monotonic()`)."""
    connections: int = 0

    def serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := _read_request(client):
                self.arrived_s.append(time.monotonic())
                self.requests.append(request)
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                for piece in script.pieces:
                    client.sendall(piece)
                    time.sleep(script.pause_s)
                if script.then == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if script.then in ("close", "reset"):
                    return


@dataclass
class Tunnel(RawServer):
    """A proxy for CONNECT."""

    to: int = 0

    def _talk(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.to)) as far:
            self.requests.append(_read_request(client))
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pass_on, args=(far, client), daemon=True)
            back.start()
            _pass_on(client, far)
            back.join(5)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def _read_request(client: socket.socket) -> bytes:
    data = b""
    while True:
        head, found, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head.lower())
        if found and len(body) >= (int(length[1]) if length else 0):
            return data
        more = client.recv(2**16)
        if not more:
            return b""
        data += more


@contextlib.contextmanager
def raw_server(*scripts: Script, host: str = "127.0.0.1") -> Iterator[RawServer]:
    """Run a `RawServer` on a loopback port while the block runs."""
    listener = _listener(host)
    with _running(RawServer(list(scripts), listener.getsockname()[1]), listener) as server:
        yield server


@contextlib.contextmanager
def tunnel(port: int) -> Iterator[RawServer]:
    """Run a proxy that lets everybody who asks for a tunnel through to `port` on this host."""
    listener = _listener("127.0.0.1")
    with _running(Tunnel([], listener.getsockname()[1], to=port), listener) as server:
        yield server


def has_ipv6() -> bool:
    """Whether this host has an IPv6 loopback."""
    try:
        _listener("::1").close()
    except OSError:
        return False
    return True


def _listener(host: str) -> socket.socket:
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


@contextlib.contextmanager
def _running(server: RawServer, listener: socket.socket) -> Iterator[RawServer]:
    thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
