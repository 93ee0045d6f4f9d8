"""The simulated server with a child, as vLLM has its engine core: it ends when the child does, and they share memory.

It takes faults: `early` (a start that says ready and cannot serve), `port` (a start that finds its port taken), `cut`
and `slow` (one stream that ends in its middle, or stands still for two seconds).
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from aiohttp import web

from tests.chaos import standin
from workers.engines import sim_server

SLOW_S = 2.0
HEADLESS_S = 1.0
"""For which a front end outlives its engine core (vLLM 0.32: 4 s), and says so."""


class Server(sim_server.Server):
    """A stand-in whose streams can be hurt."""

    early = False
    headless = False

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.headless else 200)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        if self.headless:
            return web.json_response({"error": {"message": "EngineDeadError"}}, status=500)
        if self.early:
            return web.json_response({"error": {"message": "the engine is not there yet"}}, status=503)
        if standin.take("slow"):
            await asyncio.sleep(SLOW_S)
        if standin.take("cut"):
            asyncio.get_running_loop().call_later(2 * self.step_s(), _close, request)
        return await super().completions(request)


def _close(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def main() -> None:
    """Entry of the process."""
    shared = Path(tempfile.mkstemp(prefix=standin.shared_memory(Path(os.environ[standin.FAULTS])), dir="/dev/shm")[1])
    held = os.open(shared, os.O_RDWR)
    ends, lives = os.pipe()
    core = subprocess.Popen([sys.executable, "-S", "-c", standin.CORE], pass_fds=[held, lives])
    subprocess.Popen([sys.executable, "-S", "-c", standin.TRACKER, str(shared)], stdin=ends)
    os.close(ends)
    os.close(lives)
    names = {"server": os.getpid(), "core": core.pid, "guard": os.getppid()}
    for role, pid in names.items():
        (Path(os.environ[standin.FAULTS]) / f"{role}.{pid}").touch()

    def end_with_core() -> None:
        code = core.wait()
        print(f"EngineDeadError: the engine core ended with {code}", file=sys.stderr, flush=True)
        Server.headless = True
        time.sleep(HEADLESS_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_core, daemon=True).start()
    Server.early = standin.take("early")
    options = sim_server.parse(sys.argv[1:])
    taken = None
    if options.port and standin.take("port"):
        taken = socket.create_server(("127.0.0.1", options.port))
    sim_server.Server = Server  # type: ignore[misc]
    try:
        sim_server.main()
    finally:
        core.kill()
        if taken is not None:
            taken.close()


if __name__ == "__main__":
    main()
