"""Is a level called client-limited when, and only when, its client was the limit? Seeded runs against a known server.

    python benchmarks/client/gating.py [--runs 200] [--first 0] [--cores SERVER CLIENT [CLIENT]]

The truth server has the first core, our client the others: of two load processes each has its own where three cores are
named, else they share one. A run is a closed loop or a Poisson open one, draws streams, load processes, interval,
length of the answers and one of six situations: nothing wrong; a slow server (three times the interval) or one that
stops writing for a while, where the client is innocent; a client of which one process's event loop is stalled again and
again, for 3 to 250 ms (log-uniform) with rests of 0.05 to 3 s (log-uniform; each half to one and a half of the run's);
such a client of a slow server; and one whose first core is shared with busy processes. Often that is too little to
matter: whether the client was the limit is told by `verdicts.blame` from the server's log, whatever the situation.

When a request came is the kernel's stamp: a server that stands still, or has much to read at once, lays nothing on the
client.

Printed is, of each situation and of all, how many were the limit and called so or missed, how many were not and called
so or rightly not. Of a client that was the limit and not called so follows what the notes beside such a level in a
run's artifacts say all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from clients import poisson_s, said
from truth import truth_server
from verdicts import HEAD, Verdict, blame, held_against, table

from analysis.load.request_notes import CLIENT_WAIT_SHARE
from workers.load import event_loop
from workers.load.client import run_load
from workers.load.endpoint import Endpoint
from workers.load.limits import added_s, client_limits, connecting_s, send_delay_s
from workers.load.plan import LoadPlan, LoadResult
from workers.load.tasks import merge, split

TOKENS = (32, 128, 256)
SECONDS = 3.0
"""A run is about so long, or two rounds of its streams."""
SLOWER = 3
SITUATIONS = (
    "nothing", "slow server", "server pauses", "stalled client", "stalled, slow server", "crowded core",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One draw."""

    seed: int
    situation: str
    streams: int
    processes: int
    interval_ms: float
    """Of a server in order."""
    tokens: int
    strength: float
    """Of pauses and of a crowd, 0 to 1."""
    stall_ms: float
    rest_s: float
    poisson: bool

    @property
    def stalled(self) -> bool:
        """Whether one of the client's processes is."""
        return self.situation.startswith("stalled")

    @property
    def served_ms(self) -> float:
        """The server's interval."""
        return self.interval_ms * (SLOWER if self.situation.endswith("slow server") else 1)

    @property
    def rate(self) -> float:
        """Requests a second that keep the streams busy where the server is in order."""
        return self.streams / (self.tokens * self.interval_ms / 1000)

    @property
    def requests(self) -> int:
        """Requests that are sent."""
        round_ms = self.tokens * (self.interval_ms if self.poisson else self.served_ms)
        least = 6 if self.streams == 4 and self.poisson else 2
        return self.streams * max(math.ceil(SECONDS * 1000 / round_ms), least)


def draw(seed: int) -> Run:
    """Return run `seed`."""
    dice = random.Random(seed)

    def log_uniform(low: float, high: float) -> float:
        return math.exp(dice.uniform(math.log(low), math.log(high)))

    return Run(
        seed,
        SITUATIONS[seed % len(SITUATIONS)],
        streams=dice.choice([4, 16, 64, 256]),
        processes=dice.choice([1, 2]),
        interval_ms=dice.choice([5.0, 10.0]),
        tokens=dice.choice(TOKENS),
        strength=dice.random(),
        stall_ms=log_uniform(3, 250),
        rest_s=log_uniform(0.05, 3),
        poisson=bool(seed // len(SITUATIONS) % 2),
    )


def main() -> None:
    """Run and print, or be the client of one run."""
    if sys.argv[1:2] == ["client"]:
        print(json.dumps(client(Run(**json.loads(sys.argv[2])), int(sys.argv[3]), json.loads(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0))[:2])
    options = parser.parse_args()
    print(f"sent by {event_loop.client_versions()}", flush=True)
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    wrong = []
    for seed in range(options.first, options.first + options.runs):
        run = draw(seed)
        seen = one(run, options.cores)
        verdict = Verdict(was=bool(seen["blame"]), called=bool(seen["limits"]))
        verdicts[f"{run.situation}, {'Poisson' if run.poisson else 'closed'}"].append(verdict)
        if verdict.was != verdict.called:
            wrong.append((run, seen))
    print(f"{'':30}{HEAD}")
    for situation, those in sorted(verdicts.items()):
        print(f"{situation:30}{table(those)}")
    print(f"{'all':30}{table(each for those in verdicts.values() for each in those)}")
    for run, seen in wrong:
        missed = "" if seen["limits"] else f", missed; noted beside it: {', '.join(seen['noted']) or 'NOTHING'}"
        print(f"{run}{missed}\n    {seen}")


def one(run: Run, cores: list[int]) -> dict[str, Any]:
    """Do one run; return what the client said, and in what it was to blame by the server's log (`blame`)."""
    with tempfile.TemporaryDirectory() as made:
        with truth_server(Path(made), cores[0], run.served_ms) as server, _crowd(run, cores[1]):
            process = subprocess.Popen(
                [sys.executable, __file__, "client", json.dumps(run.__dict__), str(server.port), json.dumps(cores[1:])],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert process.stdout is not None
            for _ in range(run.processes):
                process.stdout.readline()  # one is about to send
            if run.situation == "server pauses":
                time.sleep(0.6)
                for _ in range(2):
                    server.process.send_signal(signal.SIGSTOP)
                    time.sleep(0.1 + 0.2 * run.strength)
                    server.process.send_signal(signal.SIGCONT)
                    time.sleep(0.3)
            printed, _ = process.communicate(timeout=300)
        seen: dict[str, Any] = json.loads(printed)
        logged = server.by_body()
    seen["blame"] = blame(held_against(logged, seen.pop("requests")), run.streams)
    return seen


@contextlib.contextmanager
def _crowd(run: Run, core: int) -> Iterator[None]:
    """Processes that keep the client's core busy, where that is the situation."""
    busy = f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    number = 1 + round(3 * run.strength) if run.situation == "crowded core" else 0
    crowd = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(number)]
    try:
        yield
    finally:
        for other in crowd:
            other.kill()
            other.wait()


def client(run: Run, port: int, cores: list[int]) -> dict[str, Any]:
    """Send the load of one run from its processes, the first of them stalled where that is its situation."""
    due_s = poisson_s(run.rate, run.requests, str(run.seed)) if run.poisson else []
    plan = LoadPlan(
        Endpoint(f"http://127.0.0.1:{port}", "truth"), run.streams, run.requests, 16, run.tokens, 0, 32_000, run.seed,
        120.0, due_s=tuple(due_s),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as meeting, ProcessPoolExecutor(run.processes, get_context("spawn")) as pool:
        parts = split(plan, run.processes, Path(meeting))
        parts = [replace(part, cores=(cores[at % len(cores)],)) for at, part in enumerate(parts)]
        stalls = [run if run.stalled and not at else None for at in range(run.processes)]
        result = merge(list(pool.map(_send, parts, stalls)))
    failed = [row for row in result.requests if not row.ok]
    assert not failed, failed[0]
    return {
        "limits": client_limits(result),
        "noted": _noted(result),
        "requests": said(plan, result),
        "delay_p99_ms": (send_delay_s(result.requests) or 0) * 1000,
        "connect_p99_ms": (connecting_s(result.requests) or 0) * 1000,
        "share": result.achieved_share,
        "lag_p99_ms": max(each.lag_p99_s or 0 for each in result.clients) * 1000,
        "busy": max(each.cpu_share + (each.wait_share or 0) for each in result.clients),
    }


def _send(part: LoadPlan, stalled: Run | None) -> LoadResult:
    """Send what one process has to, on its core; stalled as a run says."""
    os.sched_setaffinity(0, part.cores)
    print("sending", flush=True)

    async def stall(run: Run) -> None:
        dice = random.Random(run.seed)
        while True:
            await asyncio.sleep(dice.uniform(0.5, 1.5) * run.rest_s)
            time.sleep(run.stall_ms / 1000)  # noqa: ASYNC251 - that is the stall

    async def load() -> LoadResult:
        stalling = asyncio.ensure_future(stall(stalled)) if stalled else None
        try:
            return await run_load(part)
        finally:
            if stalling is not None:
                stalling.cancel()

    return event_loop.run(load())


def _noted(result: LoadResult) -> list[str]:
    """What of the client stands in the notes of a level (`analysis.load.request_notes`), and how much of it."""
    waited = max(each.wait_share or 0.0 for each in result.clients)
    named = [f"{name} {1000 * worst:.1f} ms" for name, worst in added_s(result).items()]
    return [*named, *([f"wait_share {waited:.0%}"] if waited > CLIENT_WAIT_SHARE else [])]


if __name__ == "__main__":
    main()
