"""How much more do two load processes carry than one? Against truth servers that have cores of their own.

    python benchmarks/client/scale.py [--streams 512 1024 1536 2048] [--servers 4] [--processes 1 2 4] [--poisson]

A closed loop, or with --poisson an open one at the rate that keeps so many streams in flight on average. Each load
process and each server is pinned to its own core; the servers share one port, among which the kernel divides the
connections. For every number of processes the ladder gives streams for each process; printed is the highest load that
was carried and, as the check of the merge, rows against requests and tokens against what the servers wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from clients import poisson_s
from truth import TruthServer, truth_server

from workers.load.client import generate
from workers.load.endpoint import Endpoint
from workers.load.event_loop import client_versions
from workers.load.plan import LoadPlan
from workers.load.tasks import merge, split

TOKENS, INTERVAL_MS, PROMPT_TOKENS = 64, 10.0, 16


@dataclass(frozen=True)
class Carried:
    """What one level carried, and whether nothing was lost on the way."""

    tok_s: float
    share: float
    busiest: float
    """Share of its core of the load process that ran most."""
    waited: float
    """Share of the window in which one had to wait for its core, of the one that did most."""
    exact: bool
    true_p99_ms: float
    """Of the gaps between a stream's tokens as the servers wrote them: above the interval they were the limit."""


def main() -> None:
    """Run and print."""
    options = _options()
    cores = sorted(os.sched_getaffinity(0))
    most = max(options.processes)
    if len(cores) < options.servers + most:
        sys.exit(f"{len(cores)} cores, {options.servers + most} are needed: one for each server and load process")
    print(f"sent by {client_versions()}")
    best: dict[int, float] = {}
    for processes in options.processes:
        for streams in options.streams:
            runs = [
                _level(processes, streams * processes, options, cores[: options.servers], cores[options.servers :])
                for _ in range(options.runs)
            ]
            seen = [(each.tok_s, each.share, each.busiest, each.waited, each.true_p99_ms) for each in runs]
            tok_s, share, busiest, waited, true_p99_ms = map(statistics.median, zip(*seen, strict=True))
            best[processes] = max(best.get(processes, 0.0), tok_s)
            print(
                f"{processes} processes, {streams * processes:5} streams: {tok_s:9,.0f} tok/s, {share:.1%} of "
                f"the ideal load, busiest process {busiest:.0%} of its core, waited for it {waited:.0%}, "
                f"true p99 gap {true_p99_ms:.1f} ms, "
                f"rows and tokens {'exact' if all(each.exact for each in runs) else 'NOT EXACT'}",
                flush=True,
            )
    for processes, tok_s in best.items():
        print(f"{processes} processes carry {tok_s:,.0f} tok/s at most, {tok_s / best[options.processes[0]]:.2f} x")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[512, 1024, 1536, 2048], help="of each process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="requests of every stream, one after the other")
    parser.add_argument("--runs", type=int, default=5, help="of every level: medians are shown")
    parser.add_argument(
        "--poisson", action="store_true", help="an open loop at the rate that keeps --streams in flight"
    )
    return parser.parse_args()


def _level(
    processes: int, streams: int, options: argparse.Namespace, server_cores: list[int], client_cores: list[int]
) -> Carried:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with contextlib.ExitStack() as running:
            servers: list[TruthServer] = []
            for core in server_cores:
                port = servers[0].port if servers else 0
                servers.append(running.enter_context(truth_server(directory, core, INTERVAL_MS, port)))
            endpoint = Endpoint(f"http://127.0.0.1:{servers[0].port}", "truth")
            answer_s, requests = TOKENS * INTERVAL_MS / 1000, streams * options.rounds
            due_s = poisson_s(streams / answer_s, requests, "truth") if options.poisson else []
            plan = LoadPlan(
                endpoint, streams, requests, PROMPT_TOKENS, TOKENS, first_ordinal=0, vocab_size=32_000, seed=0,
                timeout_s=60.0, due_s=tuple(due_s),
            )  # fmt: skip
            parts = [
                replace(part, cores=(core,))
                for part, core in zip(split(plan, processes, directory), client_cores, strict=False)
            ]
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                result = merge(list(pool.map(generate, parts)))
        logs = [writes for server in servers for _, writes in server.requests()]
        written = sum(map(len, logs))
        gaps = np.concatenate([np.diff(writes) for writes in logs]) * 1000
    tokens = sum(row.completion_tokens or 0 for row in result.requests if row.ok)
    whole = [row.ordinal for row in result.requests if row.ok] == list(range(plan.num_requests))
    tok_s = tokens / result.duration_s
    busiest = max(client.cpu_share for client in result.clients)
    waited = max(client.wait_share or 0.0 for client in result.clients)
    # of an open loop: as many tokens, from the first arrival to the end of the last answer
    ideal = requests * TOKENS / (due_s[-1] + answer_s) if due_s else streams * 1000 / INTERVAL_MS
    true_p99_ms = float(np.percentile(gaps, 99))
    return Carried(tok_s, tok_s / ideal, busiest, waited, whole and tokens == written, true_p99_ms)


if __name__ == "__main__":
    main()
