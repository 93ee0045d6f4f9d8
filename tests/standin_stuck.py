"""The simulator as a module that can be forked. Forked with STUCK set it says one word and hangs (`hang`), or ends
(`end`), or computes (`works`) or reads (`reads`) for ever without a word, or repeats for ever that it waits (`waits`)
or other words (`talks`), or forks beside a thread at once (`thread`) or at its first completion (`late`), or is ready
and answers completions with an error (`gate`) or never (`mute`).

With STARTS_AS `silent` it says nothing and never listens, with `slow` it says a word ten times a second for three
seconds before it listens, with `stubborn` it does not heed SIGTERM and never listens."""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path

from aiohttp import web

from workers.engines import sim_server

REPEATED = {
    "waits": "(EngineCore pid=2) INFO [shm_broadcast.py:704] No available shared memory broadcast block found in 60 s.",
    "talks": "loading",
}


async def no_completion(_server: object, _request: object) -> web.Response:
    """Answer as an engine that has been damaged."""
    return web.json_response({"error": {"message": "the engine is dead"}}, status=500)


async def no_answer(_server: object, _request: object) -> web.Response:
    """Never answer, as an engine whose worker hangs."""
    await asyncio.sleep(600)
    return web.Response()


plain_completions = sim_server.Server.completions


def fork_beside_a_thread() -> None:
    """Fork as an engine does that makes its processes in turn, while a plugin's thread runs."""
    threading.Thread(target=time.sleep, args=(600,), name="of a plugin", daemon=True).start()
    if os.fork() == 0:
        os._exit(0)


async def late_fork(server: sim_server.Server, request: web.Request) -> web.StreamResponse:
    """Answer, but fork before that."""
    fork_beside_a_thread()
    return await plain_completions(server, request)


if __name__ == "__main__":
    starts_as = os.environ.get("STARTS_AS")
    if starts_as == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("starting", flush=True)
    if starts_as in ("silent", "stubborn"):
        time.sleep(600)
    if starts_as == "slow":
        for _ in range(30):
            print("loading", flush=True)
            time.sleep(0.1)
    if any(argument.endswith("warm_parent.py") for argument in sys.orig_argv):
        if os.environ.get("STUCK") == "hang":
            time.sleep(600)
        while os.environ.get("STUCK") == "works":
            pass
        while os.environ.get("STUCK") == "reads":
            with Path("/dev/zero").open("rb") as zeros:
                zeros.read(2**20)
            time.sleep(0.01)
        if os.environ.get("STUCK") == "end":
            sys.exit("a lock that another thread held")
        if os.environ.get("STUCK") == "thread":
            fork_beside_a_thread()
        if os.environ.get("STUCK") == "late":
            sim_server.Server.completions = late_fork  # type: ignore[method-assign]
        if os.environ.get("STUCK") == "gate":
            sim_server.Server.completions = no_completion  # type: ignore[assignment]
        if os.environ.get("STUCK") == "mute":
            sim_server.Server.completions = no_answer  # type: ignore[assignment]
        repeated = REPEATED.get(os.environ.get("STUCK", ""))
        while repeated is not None:
            print(repeated, flush=True)
            time.sleep(0.1)
    sim_server.main()
