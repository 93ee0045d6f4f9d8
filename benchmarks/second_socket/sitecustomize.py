"""On PYTHONPATH of a server under `against_vllm_bench.py`: uvicorn listens on one more socket, at SECOND_SOCKET.

So one server, from one start, is asked over TCP and over a Unix socket in turns. Nothing else of it is touched.
"""

from __future__ import annotations

import os
import socket

import uvicorn

_startup = uvicorn.Server.startup


async def _startup_with_another(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
    another = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    another.bind(os.environ["SECOND_SOCKET"])
    await _startup(self, sockets=[*(sockets or []), another])


if "SECOND_SOCKET" in os.environ:
    uvicorn.Server.startup = _startup_with_another  # type: ignore[method-assign]
