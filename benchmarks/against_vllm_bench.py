"""Whole-run output tok/s of our load client against `vllm bench serve`, on one live server, in turns.

    python benchmarks/against_vllm_bench.py [--model phi-3-mini-4k] [--levels 1 16 64] [--pairs 3]

One vLLM server on TCP; at each level both clients send the same number of requests of the same lengths, warmed up at
the level, `--pairs` times in turns. Prints the ratio of the medians, both sides' spread, and the prefix-cache hits that
the server counted. Both figures are completion tokens over first send to last byte: ramp and drain are in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from contract.specs import Mode, Point, PointKind, Purpose, ServerSpec, SessionSpec
from orchestrator.compose import compose
from orchestrator.models import resolve
from workers.devices.nvml import visible_cards
from workers.load.client import generate
from workers.session import Session

PEER = """
import argparse, sys
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args(sys.argv[1:]))
"""
"""`vllm bench serve` without vLLM's front door, which the CPU build's wheel leaves broken."""


@dataclass(frozen=True)
class Load:
    """What both clients are asked for."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int


def main() -> None:
    """Run and print."""
    options = _options()
    cards = visible_cards()
    (experiment,) = compose(["+sweep=kv", f"model={options.model}"], [])
    model = resolve(experiment.model)
    server = ServerSpec(
        options.max_model_len,
        gpu_memory_utilization=0.9 if cards else 0.1,
        kv_cache_memory_bytes=None if cards else 2**30,
        enforce_eager=not cards,
        transport="tcp",
    )
    device, gpus = ("cuda", 1) if cards else ("cpu", 0)
    spec = SessionSpec("bench", model, server, "vllm", device, Mode.UTILIZATION, gpus, None, (), load_processes=1)
    session = Session(spec, "bench", 1, ["0"] if cards else [], lambda plans: [generate(plan) for plan in plans])
    try:
        row = session.start()
        if row.failure_class:
            sys.exit(f"the server did not start: {row.failure_message}")
        print(
            f"{options.model} on {row.device_name}, vLLM {row.vllm_version}, ready in {row.ready_s:.0f} s", flush=True
        )
        for level in options.levels:
            load = Load(level, max(options.requests, options.per_level * level), options.prompt, options.output)
            _compare(session, load, options.pairs)
    finally:
        end = session.stop().row
        print(f"memory after the stop: {(end.mem_after_stop_bytes or 0) >> 20} MiB")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="phi-3-mini-4k", help="a shape of conf/model")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24, help="of a level, at the least")
    parser.add_argument("--per-level", type=int, default=10, help="requests for each one in flight")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    return parser.parse_args()


def _compare(session: Session, load: Load, pairs: int) -> None:
    ours, theirs, hits = [], [], [0.0, 0.0]
    for turn in range(pairs):
        ours.append(_our_turn(session, load, turn))
        before = session._scrape()
        theirs.append(_their_turn(session, load, seed=1000 * load.concurrency + turn))
        after = session._scrape()
        asked = (after.prefix_queries or 0) - (before.prefix_queries or 0)
        hits[1] = max(hits[1], ((after.prefix_hits or 0) - (before.prefix_hits or 0)) / max(asked, 1))
        hits[0] = max(hits[0], ours[-1][1])
    tok_s = statistics.median(rate for rate, _ in ours), statistics.median(theirs)
    spread = [(max(rates) - min(rates)) / statistics.median(rates) for rates in ([r for r, _ in ours], theirs)]
    print(
        f"concurrency {load.concurrency:4}: {load.requests} requests of {load.prompt_tokens} + {load.output_tokens}: "
        f"ours {tok_s[0]:.1f} tok/s (spread {spread[0]:.1%}), vllm bench serve {tok_s[1]:.1f} ({spread[1]:.1%}), "
        f"ratio {tok_s[0] / tok_s[1]:.4f}; prefix-cache hits {hits[0]:.2%} and {hits[1]:.2%}",
        flush=True,
    )


def _our_turn(session: Session, load: Load, turn: int) -> tuple[float, float]:
    point = Point(
        f"c{load.concurrency}-{turn}", PointKind.LOAD, Purpose.CONCURRENCY, "bench", load.concurrency, load.requests,
        load.prompt_tokens, load.output_tokens, warmup_requests=load.concurrency, repeat=turn,
    )  # fmt: skip
    row = session.measure(point)
    if row.failure_class or row.tok_s is None:
        sys.exit(f"our turn failed: {row.failure_message}")
    return row.tok_s, row.prefix_hit_ratio or 0.0


def _their_turn(session: Session, load: Load, seed: int) -> float:
    endpoint = session._endpoint
    assert endpoint is not None
    with tempfile.TemporaryDirectory() as directory:
        asked = {
            "backend": "openai", "base-url": endpoint.base_url, "model": str(session._workspace.model),
            "served-model-name": endpoint.model, "dataset-name": "random", "random-input-len": load.prompt_tokens,
            "random-output-len": load.output_tokens, "num-prompts": load.requests,
            "max-concurrency": load.concurrency, "num-warmups": load.concurrency, "seed": seed,
            "result-dir": directory, "result-filename": "result.json",
        }  # fmt: skip
        command = [sys.executable, "-c", PEER, "--ignore-eos", "--save-result", "--disable-tqdm"]
        command += [word for name, value in asked.items() for word in (f"--{name}", str(value))]
        environment = {**os.environ, "OPENAI_API_KEY": endpoint.api_key or "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        try:
            result = json.loads((Path(directory) / "result.json").read_text())
        except (OSError, ValueError):
            sys.exit(f"the peer failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if result["completed"] != load.requests or result["total_output_tokens"] != load.requests * load.output_tokens:
        sys.exit(f"the peer completed {result['completed']} of {load.requests}, {result['total_output_tokens']} tokens")
    return float(result["output_throughput"])


if __name__ == "__main__":
    main()
