"""Emptying a server's prefix cache: what it says counts, not its status."""

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from workers import prefix_cache
from workers.load.endpoint import Endpoint


@contextmanager
def server(socket: Path, answer: Callable[[int], tuple[int, str]]) -> Iterator[Endpoint]:
    """A server whose n-th POST is answered with a status and a body."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            status, body = answer(len(asked))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def address_string(self) -> str:
            return "socket"

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.ThreadingUnixStreamServer(str(socket), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield Endpoint("http://localhost", "tiny", uds=str(socket))
        made.shutdown()
        thread.join()
    assert set(asked) == {"/reset_prefix_cache"}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, '{"success": true}'), True),
        ((404, '{"detail": "Not Found"}'), False),
        ((200, ""), False),  # vLLM 0.25.1
        ((200, "[]"), False),
        ((200, '{"success": "yes"}'), False),
    ],
)
def test_only_a_server_that_says_so_has_emptied_its_cache(tmp_path: Path, answer: tuple[int, str], said: bool) -> None:
    with server(tmp_path / "s", lambda _: answer) as endpoint:
        assert prefix_cache.reset(endpoint) is said


def test_blocks_that_are_held_for_a_moment_are_waited_for(tmp_path: Path) -> None:
    with server(tmp_path / "s", lambda n: (200, '{"success": true}' if n > 2 else '{"success": false}')) as endpoint:
        assert prefix_cache.reset(endpoint) is True


def test_blocks_that_stay_held_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "LIMIT_S", 0.2)
    with server(tmp_path / "s", lambda _: (200, '{"success": false}')) as endpoint:
        assert prefix_cache.reset(endpoint) is False


def test_over_tcp_nobody_is_asked() -> None:
    assert prefix_cache.reset(Endpoint("http://127.0.0.1:1", "tiny")) is None
