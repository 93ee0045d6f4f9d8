"""From the start of a load process to its first request, the interpreter and all imports included.

    python benchmarks/client/start.py [--streams 256] [--runs 9] [--tokens 12 1024 4000]

A process is started and sends a level of ten requests a stream to a listener that notes the first byte it gets. Prints
the shortest and the median wall time, and the CPU time that the process had used by then: about what the wall time is
where nobody else wants the core.
"""

from __future__ import annotations

import argparse
import select
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 10
LOAD = """
import sys
from workers.load.client import generate
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan
port, streams, requests, tokens = map(int, sys.argv[1:])
generate(LoadPlan(Endpoint(f"http://127.0.0.1:{port}", "m"), streams, requests, tokens, 64, 0, 151_936, 0, 60.0))
"""


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[12, 1024, 4000])
    options = parser.parse_args()
    print("| prompt tokens | first request, s: shortest | median | CPU, s: median |\n|---:|---:|---:|---:|")
    for tokens in options.tokens:
        walls, cpus = zip(*(_one(options.streams, tokens) for _ in range(options.runs)), strict=True)
        cells = min(walls), statistics.median(walls), statistics.median(cpus)
        print(f"| {tokens:,} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


def _one(streams: int, tokens: int) -> tuple[float, float]:
    with socket.create_server(("127.0.0.1", 0), backlog=streams) as listener:
        arguments = map(str, (listener.getsockname()[1], streams, streams * ROUNDS, tokens))
        started_s = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", LOAD, *arguments]) as load:
            try:
                _wait_for_a_request(listener, load)
                first_s = time.monotonic()
                cpu_s = int(Path(f"/proc/{load.pid}/schedstat").read_text().split()[0]) / 1e9
            finally:
                load.kill()
    return first_s - started_s, cpu_s


def _wait_for_a_request(listener: socket.socket, load: subprocess.Popen[bytes]) -> None:
    with select.epoll() as poll:
        poll.register(listener, select.EPOLLIN)
        connections: dict[int, socket.socket] = {}
        while load.poll() is None:
            for number, _ in poll.poll(1.0):
                if number != listener.fileno():
                    if connections[number].recv(5) == b"POST ":
                        return
                    sys.exit("the load process closed a connection without a request")
                one, _ = listener.accept()
                connections[one.fileno()] = one
                poll.register(one, select.EPOLLIN)
    sys.exit("the load process ended without a request")


if __name__ == "__main__":
    main()
