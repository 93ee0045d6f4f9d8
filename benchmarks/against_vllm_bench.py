"""Our load client against `vllm bench serve` on one live server, in turns; then a Unix socket against TCP on the same.

    python benchmarks/against_vllm_bench.py [--model phi-3-mini-4k] [--levels 1 16 64 128 256] [--pairs 6] [--no-uds]
        [--text]

One vLLM server, which listens on TCP and (`second_socket/`) on a Unix socket, so that no difference is that of two
starts. At each level two sides send the same number of requests of the same lengths, warmed up at the level, `--pairs`
times in turns: first our client and the peer over TCP, then our client over the Unix socket and over TCP. Who begins
changes from pair to pair (ABBA), and the first pair is thrown away, for the server is not yet what it will be. What a
session watches (cards, processes, the server's metrics) is watched in every turn.

Prints medians of output tok/s, TTFT and TPOT with their ranges, the geometric means of the pairs' ratios with 90 %
intervals (paired t on logarithms), and of the same turns what the server counted, of either side without its warm-up:
mean TTFT, queueing, prefill and prefix-cache hits. A difference in mean TTFT that is not in the server's own arose on
the way or in the clients; one that is in it arose in the server, which was asked differently. Whole-run figures: tok/s
is completion tokens over first send to last byte, ramp and drain in it. Both ask for temperature 0. Our prompts are
token ids, the peer's are text, which the server turns into tokens within the TTFT; with `--text` ours are text of about
as many tokens, too, each behind a prefix of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

from tokenizers import Tokenizer

from analysis.numbers.intervals import Interval, mean_log, pooled_noise
from contract.specs import Mode, Point, PointKind, Purpose, ServerSpec, SessionSpec
from orchestrator.compose import compose
from orchestrator.models import resolve
from workers.devices.nvml import visible_cards
from workers.histogram import gained
from workers.load.client import generate
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan, LoadResult
from workers.load.prompts import GivenText
from workers.metrics import ServerMetrics
from workers.session import Session
from workers.standstill import at_rest

PEER = """
import argparse, asyncio, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM logs must not stand among the answers
from vllm.benchmarks import serve
def said(*words, **options):
    print(*words, **options)
    if words == ("Warmup run completed.",):  # nothing is in flight: whoever asked reads the server's counters first
        print(json.dumps(WARM), file=answers, flush=True)
        sys.stdin.readline()
serve.print = said
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
for line in sys.stdin:
    result = asyncio.run(serve.main_async(parser.parse_args(json.loads(line))))
    print(json.dumps({name: result[name] for name in KEEP}), file=answers, flush=True)
"""
"""`vllm bench serve` without vLLM's front door, which the CPU build's wheel leaves broken; imported once.

It answers a turn with `WARM` as its warm-up is over, goes on at the next line, and answers with its result."""
WARM = "warm"


@dataclass(frozen=True)
class Load:
    """What both clients are asked for."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Turn:
    """What one client says of one turn."""

    tok_s: float
    p50_ttft_s: float
    p50_tpot_s: float
    mean_ttft_s: float
    server: ServerView

    @property
    def outside_s(self) -> float | None:
        """Mean TTFT less the server's own: on the way, and in the client."""
        return None if self.server.ttft_s is None else self.mean_ttft_s - self.server.ttft_s


@dataclass(frozen=True)
class ServerView:
    """What the server counted of a turn: means a request in seconds, None where it does not say."""

    ttft_s: float | None
    queue_s: float | None
    prefill_s: float | None
    prefix_hits: float

    @classmethod
    def between(cls, before: ServerMetrics, after: ServerMetrics) -> ServerView:
        """Return what came between two scrapes."""
        asked = (after.prefix_queries or 0) - (before.prefix_queries or 0)
        return cls(
            gained(before.ttft_s, after.ttft_s).mean,
            gained(before.queue_s, after.queue_s).mean,
            gained(before.prefill_s, after.prefill_s).mean,
            ((after.prefix_hits or 0) - (before.prefix_hits or 0)) / max(asked, 1),
        )


SECOND_SOCKET = Path(__file__).with_name("second_socket")
"""The directory of what has a server listen on a second socket."""
FIGURES: tuple[tuple[str, str, float, Callable[[Turn], float | None]], ...] = (
    ("tok_s", "tok/s", 1, lambda turn: turn.tok_s),
    ("p50_ttft_s", "ms", 1000, lambda turn: turn.p50_ttft_s),
    ("p50_tpot_s", "ms", 1000, lambda turn: turn.p50_tpot_s),
    ("mean_ttft_s", "ms", 1000, lambda turn: turn.mean_ttft_s),
    ("server_ttft_mean_s", "ms", 1000, lambda turn: turn.server.ttft_s),
    ("server_queue_mean_s", "ms", 1000, lambda turn: turn.server.queue_s),
    ("server_prefill_mean_s", "ms", 1000, lambda turn: turn.server.prefill_s),
    ("mean_ttft_s - server_ttft_mean_s", "ms", 1000, lambda turn: turn.outside_s),
)
RATIO_TAIL = 0.05
"""Of a ratio's interval, on either side."""


def main() -> None:
    """Run and print."""
    options = _options()
    loads = [
        Load(level, max(options.requests, options.per_level * level), options.prompt, options.output)
        for level in options.levels
    ]
    with tempfile.TemporaryDirectory() as directory, _server(options, Path(directory, "s")) as session:
        tcp = session._endpoint
        assert tcp is not None
        uds = replace(tcp, base_url="http://localhost", uds=str(Path(directory, "s")))
        with _peer(session) as peer:
            for load in loads:
                ours, theirs = in_turns(options.pairs, partial(_our_turn, session, load, tcp), partial(peer.turn, load))
                lengths = f"{load.requests} requests of {load.prompt_tokens} + {load.output_tokens}"
                _print(f"concurrency {load.concurrency:4}, {lengths}, ours against vllm bench serve", ours, theirs)
        for load in loads if options.uds else ():
            sides = (partial(_our_turn, session, load, endpoint) for endpoint in (uds, tcp))
            _print(f"concurrency {load.concurrency:4}, Unix socket against TCP", *in_turns(options.pairs, *sides))


def in_turns(pairs: int, one: Callable[[int], Turn], other: Callable[[int], Turn]) -> tuple[list[Turn], list[Turn]]:
    """Return what both sides gave, `pairs` turns each, the pairs in the order ABBA, the first of them thrown away.

    A side is given a number that no other turn of it has.
    """
    kept: tuple[list[Turn], list[Turn]] = ([], [])
    for pair in range(pairs + 1):
        sides = [(one, kept[0]), (other, kept[1])]
        for side, into in reversed(sides) if pair % 2 else sides:
            turn = side(pair)
            if pair:
                into.append(turn)
    return kept


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="phi-3-mini-4k", help="a shape of conf/model")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--pairs", type=int, default=6, help="kept; even: each side begins as often; one comes before")
    parser.add_argument("--requests", type=int, default=24, help="of a level, at the least")
    parser.add_argument("--per-level", type=int, default=10, help="requests for each one in flight")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--text", action="store_true", help="our prompts are text, as the peer's are")
    parser.add_argument("--no-uds", dest="uds", action="store_false", help="leave the Unix socket out")
    return parser.parse_args()


@contextlib.contextmanager
def _server(options: argparse.Namespace, second_socket: Path) -> Iterator[Session]:
    cards = visible_cards()
    (experiment,) = compose(["+sweep=kv", f"model={options.model}"], [])
    server = ServerSpec(
        options.max_model_len,
        gpu_memory_utilization=0.9 if cards else 0.1,
        kv_cache_memory_bytes=None if cards else 2**30,
        enforce_eager=not cards,
        transport="tcp",
    )
    device, gpus = ("cuda", 1) if cards else ("cpu", 0)
    spec = SessionSpec(
        "bench", resolve(experiment.model), server, "vllm", device, Mode.UTILIZATION, gpus, None, (), load_processes=1
    )
    text: list[str] = []  # known when the tokenizer is

    def load(plans: Sequence[LoadPlan]) -> list[LoadResult]:
        return [generate(replace(plan, text=text[0]) if text else plan) for plan in plans]

    session = Session(spec, "bench", 1, [card.id for card in cards[:1]], load)
    path = os.pathsep.join(filter(None, (str(SECOND_SOCKET), os.environ.get("PYTHONPATH"))))
    try:
        with patch.dict(os.environ, PYTHONPATH=path, SECOND_SOCKET=str(second_socket)):
            row = session.start()
        if row.failure_class:
            sys.exit(f"the server did not start: {row.failure_message}")
        print(
            f"{options.model} on {row.device_name}, vLLM {row.vllm_version}, ready in {row.ready_s:.0f} s",
            flush=True,
        )
        if options.text:
            text.append(_text_of(options.prompt, Path(session.model)))
        yield session
    finally:
        end = session.stop().row
        print(f"memory after the stop: {(end.mem_after_stop_bytes or 0) >> 20} MiB")


def _text_of(tokens: int, model: Path) -> str:
    """Return what makes a prompt of so many tokens behind the prefix of a request in the middle of a level."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    drawn = random.Random(0).choices(range(tokenizer.get_vocab_size()), k=2 * tokens)
    for length in range(len(drawn), 0, -1):
        text = tokenizer.decode(drawn[:length])
        if len(tokenizer.encode(GivenText(text, 0).prompt(500)).ids) <= tokens:
            return text
    sys.exit(f"no text of {tokens} tokens")


@contextlib.contextmanager
def _peer(session: Session) -> Iterator[Peer]:
    endpoint = session._endpoint
    assert endpoint is not None
    asked = {
        "backend": "openai", "base-url": endpoint.base_url, "model": session.model,
        "served-model-name": endpoint.model, "dataset-name": "random",
    }  # fmt: skip
    keep = (
        "completed", "total_output_tokens", "output_throughput", "median_ttft_ms", "mean_ttft_ms", "median_tpot_ms"
    )  # fmt: skip
    environment = {**os.environ, "OPENAI_API_KEY": endpoint.api_key or "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PEER.replace("KEEP", repr(keep)).replace("WARM", repr(WARM))]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        try:
            yield Peer(session, process, errors, asked)
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Peer:
    """`vllm bench serve` as a process that takes one turn a line."""

    session: Session
    process: subprocess.Popen[str]
    errors: IO[bytes]
    asked: dict[str, str]

    def turn(self, load: Load, number: int) -> Turn:
        """Send the load once, watched as ours is."""
        asked = self.asked | {
            "random-input-len": load.prompt_tokens, "random-output-len": load.output_tokens,
            "num-prompts": load.requests, "max-concurrency": load.concurrency, "num-warmups": load.concurrency,
            "seed": 1000 * load.concurrency + number, "temperature": 0,
        }  # fmt: skip
        words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
        if self._said(json.dumps([*words, "--ignore-eos", "--disable-tqdm"])) != WARM:
            sys.exit("the peer does not say when its warm-up is over: another version of vLLM?")
        before = at_rest(self.session._scrape)
        with self.session._watched():
            result = self._said("")
        after = at_rest(self.session._scrape)
        tokens = load.requests * load.output_tokens
        if result["completed"] != load.requests or result["total_output_tokens"] != tokens:
            sys.exit(f"the peer completed {result['completed']} of {load.requests}: {result}")
        p50_ttft_s, p50_tpot_s, mean_ttft_s = (
            result[name] / 1000 for name in ("median_ttft_ms", "median_tpot_ms", "mean_ttft_ms")
        )
        server = ServerView.between(before, after)
        return Turn(result["output_throughput"], p50_ttft_s, p50_tpot_s, mean_ttft_s, server)

    def _said(self, line: str) -> Any:
        """Write a line and return what is answered."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            sys.exit(f"the peer failed:\n{self.errors.read()[-3000:].decode(errors='replace')}")
        return json.loads(answer)


def ratio(ours: list[float], theirs: list[float]) -> Interval | None:
    """Return the geometric mean of the pairs' ratios with its 90 % interval; None for one pair, or a value of 0."""
    if min([*ours, *theirs]) <= 0:
        return None
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    noise = pooled_noise([ratios])
    if noise is None:
        return None
    centre, margin = mean_log(ratios), noise.margin(1 / len(ratios), RATIO_TAIL)
    return Interval(math.exp(centre), math.exp(centre - margin), math.exp(centre + margin))


def _print(what: str, ours: list[Turn], theirs: list[Turn]) -> None:
    print(f"{what}:")
    for name, unit, scale, figure in FIGURES:
        sides = [[value * scale for turn in turns if (value := figure(turn)) is not None] for turns in (ours, theirs)]
        if not all(len(side) == len(ours) for side in sides):
            print(f"  {name}: the server does not say")
            continue
        cells = [f"{statistics.median(side):.2f} ({min(side):.2f} to {max(side):.2f})" for side in sides]
        of = ratio(*sides)
        told = "" if of is None else f", ratio {of.centre:.4f} (90 % interval {of.low:.4f} to {of.high:.4f})"
        print(f"  {name}: {cells[0]} against {cells[1]} {unit}{told}")
    hits = [max(turn.server.prefix_hits for turn in turns) for turns in (ours, theirs)]
    print(f"  prefix-cache hits {hits[0]:.2%} and {hits[1]:.2%}", flush=True)


def _our_turn(session: Session, load: Load, endpoint: Endpoint, turn: int) -> Turn:
    session._endpoint = endpoint
    point = Point(
        f"c{load.concurrency}-{turn}", PointKind.LOAD, Purpose.CONCURRENCY, "bench", load.concurrency, load.requests,
        load.prompt_tokens, load.output_tokens, warmup_requests=load.concurrency, repeat=turn,
    )  # fmt: skip
    row = session.measure(point)
    if row.tok_s is None or row.p50_ttft_s is None or row.p50_tpot_s is None or row.mean_ttft_s is None:
        sys.exit(f"our turn failed: {row.failure_message}")
    if row.failure_class:
        print(f"  ours at {load.concurrency}: {row.failure_message}")
    client = row.clients[0]
    print(
        f"  ours: {row.tok_s:.1f} tok/s, client {client.cpu_share:.0%} of a core, loop late by "
        f"{(client.lag_p99_s or 0) * 1000:.1f} ms (p99)",
        flush=True,
    )
    server = ServerView(
        row.server_ttft_mean_s, row.server_queue_mean_s, row.server_prefill_mean_s, row.prefix_hit_ratio or 0.0
    )
    return Turn(row.tok_s, row.p50_ttft_s, row.p50_tpot_s, row.mean_ttft_s, server)


if __name__ == "__main__":
    main()
