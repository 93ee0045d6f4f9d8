"""The event loop of a load process: one whose `transport.write` has given the bytes to the kernel when it returns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import aiohttp
import uvloop

WRITES_AT_ONCE = (0, 23)
"""uvloop before it keeps what is written until the end of the loop's pass, up to 8 ms with 512 streams: a request's
stamp would be early by that, and its TTFT too long. pyproject.toml asks for it; a system's vLLM may bring another."""

_T = TypeVar("_T")


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end and return its result; for callers without a running event loop."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the loop: uvloop, or asyncio's own where uvloop is too old to write at once."""
    return uvloop.new_event_loop if _writes_at_once() else asyncio.SelectorEventLoop


def client_versions() -> str:
    """Return what the load client is made of here, e.g. "aiohttp 3.14.5, uvloop 0.23.0"."""
    found = f"uvloop {_installed()}"
    loop = found if _writes_at_once() else f"asyncio's loop ({found} is too old)"
    return f"aiohttp {aiohttp.__version__}, {loop}"


def note() -> str | None:
    """Return that another loop than uvloop sends, and what to do; None where uvloop does."""
    if _writes_at_once():
        return None
    wanted = "uvloop {}.{} or newer".format(*WRITES_AT_ONCE)
    return f"load was sent by {client_versions()}, which takes more of this client's CPU a token: install {wanted}"


def _installed() -> str:
    return str(uvloop.__version__)  # type: ignore[attr-defined]


def _writes_at_once() -> bool:
    major, minor = _installed().split(".")[:2]
    return (int(major), int(minor)) >= WRITES_AT_ONCE
