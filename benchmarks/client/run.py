"""Our client, the floor of raw sockets, `vllm bench serve` and other tools against one server whose truth is known.

    python benchmarks/client/run.py [--streams 256 512] [--runs 5] [--clients floor ours bench aiperf] [--poisson]

In turns: `floor`, `ours`, `bench`, and those of `guidellm`, `aiperf` and `inference-perf` that are on PATH (each in an
environment of its own: `PATH=$PATH:/path/to/its/bin`), or what --clients names.
With --poisson requests arrive at random, at the rate that keeps as many in flight on average, and tools are left out.
Two cores: the server on the first, the client of the moment on the second. 64 tokens a request, 10 ms apart. Prints
medians over the runs, and ours over each other client's CPU; truth is what the server logged in the same run, and
by its log ours is the limit where `gating.py` would say so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers import PEERS, Job, measure
from truth import truth_server
from verdicts import blame, held_against

from orchestrator.compose import compose
from orchestrator.models import resolve
from workers.load.event_loop import client_versions
from workers.models import write_model_dir

HERE = Path(__file__).parent
OWN = ("floor", "ours", "bench")
NAMES = {"floor": "the floor", "bench": "vllm bench serve"}
TOKENS, INTERVAL_MS = 64, 10.0


def main() -> None:
    """Run and print."""
    options = _options()
    print(f"ours: {client_versions()}")
    (experiment,) = compose(["+sweep=kv", "model=tiny"], [])
    with tempfile.TemporaryDirectory() as directory:
        model = write_model_dir(resolve(experiment.model), Path(directory) / "model")
        for streams in options.streams:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.clients}
            for _ in range(options.runs):
                for name in options.clients:
                    found[name].append(_one(name, streams, options, Path(directory), model))
            _print(streams, found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6, help="requests of every stream, one after the other")
    parser.add_argument("--clients", nargs="+", choices=[*OWN, *PEERS])
    parser.add_argument("--poisson", action="store_true", help="an open loop")
    parser.add_argument("--cores", type=int, nargs=2, default=sorted(os.sched_getaffinity(0))[:2])
    options = parser.parse_args()
    found = [name for name in PEERS if shutil.which(name)]
    options.clients = options.clients or [*OWN, *([] if options.poisson else found)]
    named = [name for name in options.clients if name in PEERS]
    if options.poisson and named:
        parser.error(f"only a closed loop is measured of {', '.join(named)}")
    if lacking := [name for name in named if name not in found]:
        parser.error(f"not on PATH: {', '.join(lacking)}")
    return options


def _one(name: str, streams: int, options: argparse.Namespace, directory: Path, model: Path) -> dict[str, Any]:
    with truth_server(directory, options.cores[0], INTERVAL_MS) as server:
        if name in PEERS:
            with tempfile.TemporaryDirectory() as own:
                job = Job(server.port, streams, streams * options.rounds, TOKENS, Path(own))
                measured = measure(name, shutil.which(name) or name, job, options.cores[1])
        else:
            figures = _own(name, streams, options, server.port, model)
    requests = server.requests()
    if "said" in figures:
        figures["blame"] = blame(held_against(server.by_body(), figures.pop("said")), streams)
    if name in PEERS:
        whole = sum(len(writes) == TOKENS for _, writes in requests)
        if whole != len(requests) or whole != streams * options.rounds:
            sys.exit(
                f"{name} sent {len(requests)} requests, {whole} of {TOKENS} tokens, not {streams * options.rounds}"
            )
        figures = measured.figures(requests)
    requests = requests[figures.get("warmups", 0) :]
    gaps = np.concatenate([np.diff(writes) for _, writes in requests]) * 1000
    figures["true_p99_ms"] = float(np.percentile(gaps, 99))
    figures["true_ttft_ms"] = float(np.median([writes[0] - read for read, writes in requests])) * 1000
    ideal = streams * 1000 / INTERVAL_MS
    if options.poisson:  # as many tokens, from the first arrival to the end of the last answer
        ideal = streams * options.rounds * TOKENS / (figures["arrivals_s"] + TOKENS * INTERVAL_MS / 1000)
    figures["share"] = figures["tok_s"] / ideal
    figures["us_parsing"] = figures["us_all"] - figures["us_window"]
    return figures


def _own(name: str, streams: int, options: argparse.Namespace, port: int, model: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "clients.py"), name, str(port), str(options.cores[1]), str(streams),
         str(options.rounds), str(TOKENS), str(model), str(_rate(streams) if options.poisson else 0)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return figures


def _rate(streams: int) -> float:
    """Requests a second that keep `streams` in flight, by Little's law: each takes its tokens' time."""
    return streams / (TOKENS * INTERVAL_MS / 1000)


def _print(streams: int, found: dict[str, list[dict[str, Any]]]) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in found[name])

    print(f"\n{streams} streams, medians of {len(next(iter(found.values())))} runs")
    print(
        "| client | us/token in the window | parsing after it | both | share of ideal "
        "| p50 gap | p99 gap | true | TTFT | true |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    keys = (
        "us_window",
        "us_parsing",
        "us_all",
        "share",
        "gap_p50_ms",
        "gap_p99_ms",
        "true_p99_ms",
        "ttft_ms",
        "true_ttft_ms",
    )
    for name in found:
        cells = [f"{median(name, key):.1%}" if key == "share" else f"{median(name, key):.1f}" for key in keys]
        print(f"| {name} | {' | '.join(cells)} |")
    for words, key in (("calls itself", "limits"), ("by the server's log is", "blame")):
        named = [run[key] for run in found.get("ours", []) if run[key]]
        if named:
            print(f"ours {words} the limit in {len(named)} of {len(found['ours'])} runs: {'; '.join(named[-1])}")
    for line in ratios(found):
        print(line)
    sys.stdout.flush()


def ratios(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return our CPU a token over that of each other client, by the medians of their runs, a line for each."""
    cpu = {
        name: [statistics.median(run[key] for run in runs) for key in ("us_window", "us_all")]
        for name, runs in found.items()
    }
    if "ours" not in cpu:
        return []
    window, parsed = cpu.pop("ours")
    return [
        f"ours / {NAMES.get(name, name)}, CPU a token: {window / in_window:.2f} in the window, "
        f"{parsed / with_parsing:.2f} with all parsing"
        for name, (in_window, with_parsing) in cpu.items()
    ]


if __name__ == "__main__":
    main()
