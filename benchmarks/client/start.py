"""From the start of a load process to its first request, the interpreter and all imports included.

    python benchmarks/client/start.py [--streams 256] [--runs 9] [--tokens 12 1024 4000] [--ray]

A process is started and sends a level of ten requests a stream to a listener that notes the first byte it gets. Prints
the shortest and the median wall time, and the CPU time that the process's main thread had used by then: about what the
wall time is where nobody else wants the core. With --ray they are two Ray tasks, as in a run: from the moment at which
a new worker begins one and has imported nothing of ours, and from that at which the same worker begins the next.
"""

from __future__ import annotations

import argparse
import os
import pickle
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.cluster.connection import Cluster
from orchestrator.compose import compose
from orchestrator.fleet import local_fleet
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan

ROUNDS = 10
LOAD = """
import sys
from workers.load.client import generate
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan
port, streams, requests, tokens = map(int, sys.argv[1:])
generate(LoadPlan(Endpoint(f"http://127.0.0.1:{port}", "m"), streams, requests, tokens, 64, 0, 151_936, 0, 60.0))
"""


@dataclass(frozen=True, slots=True)
class Started:
    """Until a load's first request: since it was started, and what its main thread has used."""

    wall_s: float
    cpu_s: float


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[12, 1024, 4000])
    parser.add_argument("--ray", action="store_true", help="a Ray task, as in a run")
    options = parser.parse_args()
    with _ray() if options.ray else nullcontext():
        _print(_two_tasks if options.ray else _one, options)


def _print(one: Callable[[int, int], list[Started]], options: argparse.Namespace) -> None:
    names = ["a new worker's first task", "its next"] if options.ray else ["a process"]
    print("| prompt tokens | | first request, s: shortest | median | CPU, s: median |\n|---:|---|---:|---:|---:|")
    for tokens in options.tokens:
        runs = [one(options.streams, tokens) for _ in range(options.runs)]
        for name, seen in zip(names, zip(*runs, strict=True), strict=True):
            walls = [each.wall_s for each in seen]
            cells = min(walls), statistics.median(walls), statistics.median(each.cpu_s for each in seen)
            print(f"| {tokens:,} | {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)


def _one(streams: int, tokens: int) -> list[Started]:
    with socket.create_server(("127.0.0.1", 0), backlog=streams) as listener:
        arguments = map(str, (listener.getsockname()[1], streams, streams * ROUNDS, tokens))
        started_s = time.monotonic()
        with subprocess.Popen([sys.executable, "-c", LOAD, *arguments]) as load:
            try:
                _wait_for_a_request(listener, lambda: load.poll() is None)
                first_s, cpu_s = time.monotonic(), _cpu_s(load.pid)
            finally:
                load.kill()
    return [Started(first_s - started_s, cpu_s)]


@contextmanager
def _ray() -> Iterator[None]:
    (asked,) = compose(["+sweep=kv", "engine=sim"], [])
    with Cluster(asked.cluster, local_fleet(asked.cluster, asked.engine)):
        yield


def _two_tasks(streams: int, tokens: int) -> list[Started]:
    import ray

    def load(plan: bytes, said: str) -> None:  # names nothing that would have Ray import ours before it begins
        began_s = time.monotonic()
        used = Path(f"/proc/{os.getpid()}/schedstat").read_text()
        Path(said).write_text(f"{os.getpid()} {began_s} {used.split()[0]}")
        from workers.load.process import generate

        generate(pickle.loads(plan))

    task = ray.remote(num_cpus=0, max_retries=0, max_calls=2)(load)
    (pid, first), (again, following) = (_one_task(task, streams, tokens) for _ in range(2))
    if pid != again:
        sys.exit("Ray gave the second task another worker")
    return [first, following]


def _one_task(remote: Any, streams: int, tokens: int) -> tuple[int, Started]:
    """Return the worker's pid, too."""
    import ray

    def lives() -> bool:
        if ray.wait([task], timeout=0)[0]:
            ray.get(task)  # where it has failed, that says why
            return False
        return True

    with TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0), backlog=streams) as listener:
        endpoint, said = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", "m"), Path(directory, "said")
        plan = LoadPlan(endpoint, streams, streams * ROUNDS, tokens, 64, 0, 151_936, 0, 60.0)
        task = remote.remote(pickle.dumps(plan), str(said))
        _wait_for_a_request(listener, lives)
        first_s = time.monotonic()
        pid, began_s, used_ns = said.read_text().split()
        cpu_s = _cpu_s(int(pid)) - int(used_ns) / 1e9
    if ray.wait([task], timeout=60)[1]:  # nobody answers its requests any more
        sys.exit("the task went on without a server for 60 s")
    return int(pid), Started(first_s - float(began_s), cpu_s)


def _cpu_s(pid: int) -> float:
    """Return what the main thread of a process has used."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _wait_for_a_request(listener: socket.socket, lives: Callable[[], bool]) -> None:
    with select.epoll() as poll:
        poll.register(listener, select.EPOLLIN)
        connections: dict[int, socket.socket] = {}
        while True:
            events = poll.poll(1.0)
            if not (events or lives()):
                sys.exit("the load process ended without a request")
            for number, _ in events:
                if number != listener.fileno():
                    if connections[number].recv(5) == b"POST ":
                        return
                    sys.exit("the load process closed a connection without a request")
                one, _ = listener.accept()
                connections[one.fileno()] = one
                poll.register(one, select.EPOLLIN)


if __name__ == "__main__":
    main()
