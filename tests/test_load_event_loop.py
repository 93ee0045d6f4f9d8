"""The load client's event loop: when it says that a request is written, the kernel has it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import socket
import ssl
import time
import tomllib
from pathlib import Path

import pytest
import trustme
import uvloop

from contract.specs import Api
from tests.raw_server import Script, raw_server
from workers.load import event_loop, wire
from workers.load.endpoint import Endpoint, open_session

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
OLD = ("0.17.0", "0.19.0", "0.22.1")
NEW = ("0.23.0", "0.24.0.dev1", "1.0.0")


def test_what_is_written_is_with_the_kernel_when_write_returns() -> None:
    async def written() -> list[bytes]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        found = []
        for part in (b"first", b"second"):
            transport.write(part)
            found.append(theirs.recv(64))  # raises where nothing is there yet
        transport.close()
        theirs.close()
        return found

    assert event_loop.run(written()) == [b"first", b"second"]


def test_so_is_what_is_written_over_tls() -> None:
    authority = trustme.CA()
    here, there = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("model.invalid").configure_cert(there)
    authority.configure_trust(here)

    async def written() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            accepting = asyncio.create_task(asyncio.to_thread(lambda: there.wrap_socket(listener.accept()[0], True)))
            transport, _ = await asyncio.get_running_loop().create_connection(
                asyncio.Protocol, *listener.getsockname(), ssl=here, server_hostname="model.invalid"
            )
            with await accepting as accepted:
                accepted.settimeout(5)
                transport.write(b"request")
                found = accepted.recv(64)  # the loop stands meanwhile
                transport.abort()
                return found

    assert event_loop.run(written()) == b"request"


def test_a_request_arrives_while_the_loop_that_sent_it_has_not_gone_on() -> None:
    """So its stamp, taken just before, is that of its sending, whatever else the loop has to do."""

    async def sent() -> tuple[float, list[float], float]:
        with raw_server(Script([b"HTTP/1.1 204 None\r\n\r\n"])) as server:
            endpoint = Endpoint(f"http://127.0.0.1:{server.port}", "m")
            async with open_session(endpoint) as session:
                line = wire.Line(wire.Wire(session, endpoint.load_url(Api.COMPLETIONS), None), keepalive_s=1.0)
                await line.open()
                sent_s = time.monotonic()
                posting = asyncio.create_task(line.post(b"{}", wire.Answer(sent_s)))
                await asyncio.sleep(0)
                given_up_s = time.monotonic() + 5
                while not server.arrived_s and time.monotonic() < given_up_s:
                    time.sleep(0.001)  # noqa: ASYNC251 - the loop is to stand
                arrived_s = list(server.arrived_s)
                await posting
                line.close()
                return sent_s, arrived_s, given_up_s

    sent_s, arrived_s, given_up_s = event_loop.run(sent())
    assert len(arrived_s) == 1
    assert sent_s <= arrived_s[0] <= given_up_s


@pytest.mark.parametrize("version", OLD)
def test_a_uvloop_that_writes_late_is_not_used_and_rows_say_so(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvloop, "__version__", version)
    assert event_loop.loop_factory() is asyncio.SelectorEventLoop
    aiohttp = importlib.metadata.version("aiohttp")
    assert event_loop.client_versions() == f"aiohttp {aiohttp}, asyncio's loop (uvloop {version} is too old)"


@pytest.mark.parametrize("version", NEW)
def test_a_uvloop_that_writes_at_once_is_used(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvloop, "__version__", version)
    assert event_loop.loop_factory() is uvloop.new_event_loop
    assert event_loop.client_versions().endswith(f", uvloop {version}")


def test_an_installation_asks_for_what_the_code_takes() -> None:
    asked = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert "uvloop>={}.{}".format(*event_loop.WRITES_AT_ONCE) in asked
