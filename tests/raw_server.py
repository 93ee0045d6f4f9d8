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
                self.requests.append(request)
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                for piece in script.pieces:
                    client.sendall(piece)
                    time.sleep(script.pause_s)
                if script.then == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if script.then in ("close", "reset"):
                    return


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
def raw_server(*scripts: Script) -> Iterator[RawServer]:
    """Run a `RawServer` on a loopback port while the block runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = RawServer(list(scripts), listener.getsockname()[1])
    thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
