"""Is a level called client-limited when, and only when, its client was the limit? Seeded runs against a known server.

    python benchmarks/client/gating.py [--runs 200] [--cores SERVER CLIENT [CLIENT]]

The truth server has the first core, our client the others: of two load processes each has its own where three cores are
named, else they share one. A run is a closed loop or a Poisson open one, draws streams, load processes, interval,
length of the answers and one of five situations: nothing wrong; a slow server (four times the interval, or one that
stops writing for a while), where the client is innocent; a client of which one process's event loop is stalled again
and again; and one whose first core is shared with busy processes. The truth is known from the server's log: the client
was the limit where the gaps or the first tokens it reports, or the concurrency it reached, are not the server's own, or
where its open loop's requests came late to a server that was in order: what connecting to a slow one takes, or to one
that stands still, is not the client's doing (`connect_s`). Its processes' requests are due from the moment they share,
however late one of them wakes up. Of a client that was the limit and not called so is printed what the notes
beside such a level in a run's artifacts say all the same.
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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from clients import poisson_s
from truth import truth_server

from analysis.load.request_notes import ADDED, CLIENT_WAIT_SHARE, NAMED_FROM_S
from contract.rows import ClientRow
from workers.load.client import run_load
from workers.load.endpoint import Endpoint
from workers.load.limits import client_limits, connecting_s, send_delay_s
from workers.load.plan import LoadPlan, LoadResult
from workers.load.tasks import merge, split

TOKENS = (32, 128, 512)
SECONDS = 3.0
"""A run is about so long, or two rounds of its streams."""
SITUATIONS = ("nothing", "slow server", "server pauses", "stalled client", "crowded core")
LATE_MS, LATE_SHARE, SHARE = 10.0, 0.1, 0.95
"""Late is what is later than the first and than the second of what it distorts. The client is to blame where its p99
gap is so much above the server's, where its p95 of TTFT is so much above what it would be had first tokens been stamped
as they were written, where an open loop's requests came to the server (p99) so late, or where by the server's own log
less than the third was in flight."""


@dataclass(frozen=True)
class Run:
    """One draw."""

    seed: int
    situation: str
    streams: int
    processes: int
    interval_ms: float
    tokens: int
    strength: float
    """Of what is wrong, 0 to 1."""
    poisson: bool

    @property
    def rate(self) -> float:
        """Requests a second that keep the streams busy where nothing is wrong."""
        return self.streams / (self.tokens * self.interval_ms / 1000)

    @property
    def requests(self) -> int:
        """Requests that are sent."""
        least = 15 if self.streams == 4 and self.poisson else 2
        return self.streams * max(math.ceil(SECONDS * 1000 / (self.tokens * self.interval_ms)), least)


def draw(seed: int) -> Run:
    """Return run `seed`."""
    dice = random.Random(seed)
    situation, poisson = SITUATIONS[seed % len(SITUATIONS)], bool(seed // len(SITUATIONS) % 2)
    streams, interval_ms, tokens = dice.choice([4, 16, 64, 256]), dice.choice([5.0, 10.0]), dice.choice(TOKENS)
    return Run(seed, situation, streams, dice.choice([1, 2]), interval_ms, tokens, dice.random(), poisson)


def main() -> None:
    """Run and print, or be the client of one run."""
    if sys.argv[1:2] == ["client"]:
        print(json.dumps(client(Run(**json.loads(sys.argv[2])), int(sys.argv[3]), json.loads(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0))[:2])
    options = parser.parse_args()
    outcomes: Counter[tuple[str, str]] = Counter()
    wrong = []
    for seed in range(options.runs):
        run = draw(seed)
        seen = one(run, options.cores)
        verdict = ("limited" if seen["limits"] else "fine", "limited" if seen["to_blame"] else "fine")
        loop = "Poisson" if run.poisson else "closed"
        outcomes[
            f"{run.situation}, {loop}",
            "right" if verdict[0] == verdict[1] else f"called {verdict[0]}, was {verdict[1]}",
        ] += 1
        if verdict[0] != verdict[1]:
            wrong.append((run, seen))
    for (situation, outcome), count in sorted(outcomes.items()):
        print(f"{situation:24} {outcome:28} {count}")
    for run, seen in wrong:
        missed = "" if seen["limits"] else f", missed; noted beside it: {', '.join(seen['noted']) or 'NOTHING'}"
        print(f"{run}{missed}\n    {seen}")
    print(f"right: {1 - len(wrong) / options.runs:.1%} of {options.runs}")


def one(run: Run, cores: list[int]) -> dict[str, Any]:
    """Do one run; return what the client said and whether it was to blame by the server's log."""
    interval_ms = run.interval_ms * (4 if run.situation == "slow server" else 1)
    with tempfile.TemporaryDirectory() as made:
        with truth_server(Path(made), cores[0], interval_ms) as server, _crowd(run, cores[1]):
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
            said, _ = process.communicate(timeout=300)
        seen: dict[str, Any] = json.loads(said)
        requests = server.requests()
    true = np.concatenate([np.diff(writes) for _, writes in requests if len(writes) == run.tokens]) * 1000
    seen["true_p99_ms"] = float(np.percentile(true, 99))
    blame = abs(seen["gap_p99_ms"] - seen["true_p99_ms"]) > _late_ms(float(np.median(true)))
    firsts = sorted(writes[0] for _, writes in requests)  # what is written first is stamped first, or with it
    stamped = np.array(sorted(seen.pop("firsts")))
    lateness, ttft = (stamped[:, 0] - np.array(firsts)) * 1000, stamped[:, 1] * 1000
    true_ttft_ms = float(np.median([writes[0] - read for read, writes in requests])) * 1000
    seen["ttft_p95_off_ms"] = float(np.percentile(ttft, 95) - np.percentile(ttft - lateness, 95))
    blame |= seen["ttft_p95_off_ms"] > _late_ms(true_ttft_ms)
    due_s = np.array(seen.pop("due_s"))
    if run.poisson:
        delays = np.array(sorted(read for read, _ in requests)) - due_s
        seen["true_delay_ms"] = float(np.percentile(delays, 99)) * 1000
        # one that stands still also accepts and reads late; of one in order the kernel connects at once
        own = run.situation not in ("slow server", "server pauses")
        blame |= own and seen["true_delay_ms"] > _late_ms(true_ttft_ms)
    else:
        seen["true_share"] = _in_flight(requests, run.streams)
        blame |= seen["true_share"] < SHARE
    seen["to_blame"] = bool(blame)
    return seen


def _late_ms(of_ms: float) -> float:
    return max(LATE_MS, LATE_SHARE * of_ms)


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


def _in_flight(requests: list[tuple[float, list[float]]], streams: int) -> float:
    """The share of the streams that the server had to serve, from its first read to its last."""
    reads = [read for read, _ in requests]
    last = max(reads)
    held = sum(min(writes[-1], last) - read for read, writes in requests if writes)
    return held / ((last - min(reads)) * streams)


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
        stalls = [run if run.situation == "stalled client" and not at else None for at in range(run.processes)]
        result = merge(list(pool.map(_send, parts, stalls)))
    gaps = np.concatenate([row.gaps_us for row in result.requests]) / 1000
    return {
        "limits": client_limits(result.clients, result.requests, result.achieved_share),
        "noted": _noted(result.clients),
        "due_s": [result.started_monotonic_s + due for due in due_s],
        "firsts": [(result.started_monotonic_s + r.sent_s + (r.ttft_s or 0), r.ttft_s or 0) for r in result.requests],
        "delay_p99_ms": (send_delay_s(result.requests) or 0) * 1000,
        "connect_p99_ms": (connecting_s(result.requests) or 0) * 1000,
        "gap_p99_ms": float(np.percentile(gaps, 99)),
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
            await asyncio.sleep(dice.uniform(0.05, 0.3))
            time.sleep(0.03 + 0.2 * run.strength)  # noqa: ASYNC251 - that is the stall

    async def load() -> LoadResult:
        stalling = asyncio.ensure_future(stall(stalled)) if stalled else None
        try:
            return await run_load(part)
        finally:
            if stalling is not None:
                stalling.cancel()

    return uvloop.run(load())


def _noted(clients: list[ClientRow]) -> list[str]:
    """What of the load processes stands in the notes of a level (`analysis.load.request_notes`), and how much of it."""
    waited = max(each.wait_share or 0.0 for each in clients)
    late = {name: max(getattr(each, name) or 0.0 for each in clients) for name in (*ADDED, "lag_p99_s")}
    named = [f"{name} {1000 * worst:.1f} ms" for name, worst in late.items() if worst > NAMED_FROM_S]
    return [*named, *([f"wait_share {waited:.0%}"] if waited > CLIENT_WAIT_SHARE else [])]


if __name__ == "__main__":
    main()
