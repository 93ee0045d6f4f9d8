"""Our load client against `vllm bench serve` on one live server, in turns; then a Unix socket against TCP on the same.

    python benchmarks/against_vllm_bench.py [--model phi-3-mini-4k] [--levels 1 16 64 128 256] [--pairs 6] [--no-uds]
        [--no-peer] [--text] [--replay]

One vLLM server, which listens on TCP and (`second_socket/`) on a Unix socket, so that no difference is that of two
starts. At each level two sides send the same number of requests of the same lengths, warmed up at the level (the peer
by one round of one prompt, here made to differ, ours by up to four rounds, until throughput is stable), `--pairs` times
in turns: first our client and the peer over TCP, then our client over the Unix socket and over TCP. Who begins changes
from pair to pair (ABBA), and the first pair is thrown away, for the server is not yet what it will be. What a session
watches (cards, processes, the server's metrics) is watched in every turn, from this process: both clients have
processes of their own.

Prints medians of output tok/s, TTFT and TPOT with their ranges, the geometric means of the pairs' ratios with 90 %
intervals (paired t on logarithms), and of the same turns what the server counted, of either side without its warm-up:
mean TTFT and prefix-cache hits. Mean TTFT is told in four parts, which add up to it: outside the server (its client's
less the server's own: on the way, and in the client), before the engine (the server's own less the next two: text is
made tokens, the engine ends its step, the first token is brought back), queued, and in prefill. So each part of a
difference has its place; all but the first arose in the server, which was asked differently. Whole-run figures: tok/s
is completion tokens over first send to last byte, ramp and drain in it. Both ask for temperature 0. Our prompts are
token ids, the peer's are text, which the server turns into tokens within the TTFT; with `--text` ours are text of about
as many tokens, too, each behind a prefix of its own.

Further figures say whether the clients' pace is what sets their TTFT apart (`benchmarks/rounds.py`): turnaround, from
an answer's last token to the request that takes its stream; idle, from there to that request's first token; spread, how
far apart the sends of the first round lie (the client's doing) and those of a later one (the server's, too). A client
that sends sooner finds the server busy with the ends of other streams and waits within its TTFT, not before: then idle
is the same, and TTFT and turnaround differ in opposite directions. Both clients stamp alike: just before a send (the
peer makes its JSON after that), and as a chunk is read.

With `--replay` a third side takes its turns (ABC, CBA, ...): our client sends the bodies of the peer's last turn, all
fields as they were, but each text begins with a number that no other has, so that none is a prefix-cache hit. Headers,
pace and warm-up are ours: what is between this side and the peer is not in what the bodies ask for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.replay import Replay, prepare
from benchmarks.rounds import Stamps, pace
from benchmarks.turns import Interrupted, ServerView, Turn, in_turns, report
from contract.specs import Mode, Point, PointKind, Purpose, ServerSpec, SessionSpec
from orchestrator.compose import compose
from orchestrator.models import resolve
from workers.devices.nvml import visible_cards
from workers.load.client import generate
from workers.load.endpoint import Endpoint
from workers.load.plan import LoadPlan, LoadResult
from workers.load.prompts import GivenText
from workers.session import Session
from workers.standstill import at_rest

PEER = """
import argparse, asyncio, itertools, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM logs must not stand among the answers
from vllm.benchmarks import serve
stamps, bodies = [], []
warm_ups = itertools.count()
warming = True
def said(*words, **options):
    print(*words, **options)
    if words == ("Warmup run completed.",):  # nothing is in flight: whoever asked reads the server's counters first
        print(json.dumps(WARM), file=answers, flush=True)
        sys.stdin.readline()
        global warming
        warming = False
        stamps.clear()
        bodies.clear()
serve.print = said
class Heard:
    def __init__(self, session):
        self.session = session
    def post(self, **words):
        if warming:  # its text is that of the first request to be measured, which would be found in the cache
            prompt = words["json"]["prompt"]
            words["json"] = words["json"] | {"prompt": f"w{next(warm_ups):05}" + prompt[6:]}
        bodies.append(words["json"])
        return self.session.post(**words)
def heard(request):
    async def stamped(request_func_input, session, pbar=None):
        out = await request(request_func_input=request_func_input, session=Heard(session), pbar=pbar)
        stamps.append((out.start_time, out.start_time + out.ttft, out.start_time + out.latency))
        return out
    return stamped
serve.ASYNC_REQUEST_FUNCS[BACKEND] = heard(serve.ASYNC_REQUEST_FUNCS[BACKEND])
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
for line in sys.stdin:
    warming = True
    result = asyncio.run(serve.main_async(parser.parse_args(json.loads(line))))
    kept = {name: result[name] for name in KEEP} | {"stamps": stamps, "bodies": bodies}
    print(json.dumps(kept), file=answers, flush=True)
"""
"""`vllm bench serve` without vLLM's front door, which the CPU build's wheel leaves broken; imported once.

It answers a turn with `WARM` as its warm-up is over, goes on at the next line, and answers with its result. With it go
the measured requests' `rounds.Stamps` (seconds of its clock) and, in the order of their sends, their bodies. Each text
of its warm-up begins with a number of its own."""
PEERS = "vllm bench serve"
WARM = "warm"
BACKEND = "openai"
"""The peer's word for `/v1/completions`."""
KEEP = (
    "completed", "total_input_tokens", "total_output_tokens", "output_throughput", "median_ttft_ms", "mean_ttft_ms",
    "median_tpot_ms",
)  # fmt: skip
"""Of its result."""


@dataclass(frozen=True)
class Load:
    """What both clients are asked for."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int


SECOND_SOCKET = Path(__file__).with_name("second_socket")
"""The directory of what has a server listen on a second socket."""


def main() -> None:
    """Run and print."""
    options = _options()
    loads = [
        Load(level, max(options.requests, options.per_level * level), options.prompt, options.output)
        for level in options.levels
    ]
    with (
        tempfile.TemporaryDirectory() as directory,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        _server(options, Path(directory, "s"), client := started(Client(pool))) as session,
    ):
        tcp = session.endpoint
        uds = replace(tcp, base_url="http://localhost", uds=str(Path(directory, "s")))
        ours = partial(_our_turn, "ours", session)
        if options.peer:
            with _peer(session) as peer:
                for load in loads:
                    sides = [partial(ours, load, tcp), partial(peer.turn, load)]
                    if options.replay:
                        sides.append(partial(_replay, client, peer.replay, session, load, tcp))
                    _compare(options.pairs, load, sides, ["ours", PEERS, "its bodies sent by ours"])
        for load in loads if options.uds else ():
            sockets = {"Unix socket": uds, "TCP": tcp}
            sides = [partial(_our_turn, name, session, load, endpoint) for name, endpoint in sockets.items()]
            _compare(options.pairs, load, sides, list(sockets))


def _compare(pairs: int, load: Load, sides: Sequence[Callable[[int], Turn]], names: Sequence[str]) -> None:
    """Let the sides take their turns, and print each beside the second; Ctrl-C leaves the rounds that are whole."""
    interrupted = None
    try:
        kept = in_turns(pairs, *sides)
    except Interrupted as cut:
        kept, interrupted = cut.kept, cut
    for name, turns in zip(names, kept, strict=False):
        if turns and turns is not kept[1]:
            lengths = f"{load.requests} requests of {load.prompt_tokens} + {load.output_tokens}"
            what = f"concurrency {load.concurrency:4}, {lengths}, {name} against {names[1]}:"
            print("\n  ".join([what, *report(turns, kept[1])]), flush=True)
    if interrupted:
        sys.exit(str(interrupted))


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
    parser.add_argument("--replay", action="store_true", help="our client with the peer's bodies is a third side")
    parser.add_argument("--no-uds", dest="uds", action="store_false", help="leave the Unix socket out")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="the Unix socket against TCP alone")
    options = parser.parse_args()
    if not options.peer and (options.replay or not options.uds):
        parser.error("--no-peer leaves the Unix socket against TCP, so neither --replay nor --no-uds goes with it")
    if options.replay and options.requests <= max(options.levels) and options.per_level < 2:
        parser.error("--replay: a level must have more requests than its warm-up, which has one for each stream")
    return options


@dataclass
class Client:
    """Our client, in a process of its own as in a run: this one watches the server, and would hold it back."""

    pool: Executor
    text: str | None = None
    """Of all prompts; None: token ids."""
    replay: Replay | None = None
    """What takes the place of a level's requests; its warm-up, which is fewer, stays."""

    def __call__(self, plans: Sequence[LoadPlan]) -> list[LoadResult]:
        """Send the plans, one after the other."""
        return [self._send(plan) for plan in plans]

    def _send(self, plan: LoadPlan) -> LoadResult:
        bodies = None
        if self.replay is not None and plan.num_requests == len(self.replay.bodies):
            bodies = self.replay.numbered()
        return self.pool.submit(send, plan, self.text, bodies).result()


def started(client: Client) -> Client:
    """Return a client whose process is there: it does not begin in what is the server's environment alone."""
    client.pool.submit(os.getpid).result()
    return client


def send(plan: LoadPlan, text: str | None, bodies: list[dict[str, Any]] | None) -> LoadResult:
    """Send a plan, all its prompts made of a text, or with these bodies in the place of its own."""
    if bodies is None:
        return generate(replace(plan, text=text))
    with patch("workers.load.bodies.prepare", partial(prepare, bodies)):
        return generate(plan)


@contextlib.contextmanager
def _server(options: argparse.Namespace, second_socket: Path, client: Client) -> Iterator[Session]:
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
    session = Session(spec, "bench", 1, [card.id for card in cards[:1]], client)
    path = os.pathsep.join(filter(None, (str(SECOND_SOCKET), os.environ.get("PYTHONPATH"))))
    try:
        with patch.dict(os.environ, PYTHONPATH=path, SECOND_SOCKET=str(second_socket)):
            row = session.start()
        if row.failure_class:
            sys.exit(f"the server did not start: {row.failure_message}")
        print(
            f"{options.model} on {row.device_name}, vLLM {row.vllm_version}, ready in {row.ready_s:.0f} s, sent by "
            f"{row.load_client}",
            flush=True,
        )
        if options.text:
            client.text = _text_of(options.prompt, Path(session.model))
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
    endpoint = session.endpoint
    asked = {
        "backend": BACKEND, "base-url": endpoint.base_url, "model": session.model,
        "served-model-name": endpoint.model, "dataset-name": "random",
    }  # fmt: skip
    environment = {**os.environ, "OPENAI_API_KEY": endpoint.api_key or "", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as errors, peer_process(environment, errors) as process:
        os.sched_setaffinity(process.pid, session.measuring.plans.free.numbers)  # as ours binds itself
        yield Peer(session, process, errors, asked)


@contextlib.contextmanager
def peer_process(environment: dict[str, str], errors: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """Start `PEER`, and kill it in the end."""
    script = PEER
    for name, value in {"KEEP": KEEP, "WARM": WARM, "BACKEND": BACKEND}.items():
        script = script.replace(name, repr(value))
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    )
    try:
        yield process
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
    replay: Replay = field(default_factory=Replay)
    """Of its last turn."""

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
        measuring = self.session.measuring
        before = at_rest(measuring.scrape)
        with measuring.watched():
            result = self._said("")
        after = at_rest(measuring.scrape)
        tokens = load.requests * load.output_tokens
        if result["completed"] != load.requests or result["total_output_tokens"] != tokens:
            sys.exit(f"the peer completed {result['completed']} of {load.requests}: {result}")
        p50_ttft_s, p50_tpot_s, mean_ttft_s = (
            result[name] / 1000 for name in ("median_ttft_ms", "median_tpot_ms", "mean_ttft_ms")
        )
        if not load.requests == len(result["stamps"]) == len(result["bodies"]):
            sys.exit(f"{len(result['bodies'])} of the peer's requests were heard: another version of vLLM?")
        self.replay.bodies = result["bodies"]
        prompts = result["total_input_tokens"] / load.requests
        print(f"  {PEERS}: {result['output_throughput']:.1f} tok/s, prompts of {prompts:.1f} tokens", flush=True)
        return Turn(
            result["output_throughput"], p50_ttft_s, p50_tpot_s, mean_ttft_s, ServerView.between(before, after),
            pace([Stamps(*stamps) for stamps in result["stamps"]], load.concurrency),
        )  # fmt: skip

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


def _our_turn(name: str, session: Session, load: Load, endpoint: Endpoint, turn: int) -> Turn:
    session.measuring.plans.endpoint = endpoint
    point = Point(
        f"c{load.concurrency}-{turn}", PointKind.LOAD, Purpose.CONCURRENCY, "bench", load.concurrency, load.requests,
        load.prompt_tokens, load.output_tokens, warmup_requests=load.concurrency, repeat=turn,
    )  # fmt: skip
    row = session.measure(point)
    if row.tok_s is None or row.p50_ttft_s is None or row.p50_tpot_s is None or row.mean_ttft_s is None:
        sys.exit(f"a turn of {name} failed: {row.failure_message}")
    if row.failed:
        first = next(request for request in row.requests if not request.ok)
        sys.exit(f"a turn of {name} failed in {row.failed} of {load.requests}: {first.failure_message}")
    if row.failure_class:
        print(f"  {name} at {load.concurrency}: {row.failure_message}")
    client = row.clients[0]
    print(
        f"  {name}: {row.tok_s:.1f} tok/s, client {client.cpu_share:.0%} of a core, loop late by "
        f"{(client.lag_p99_s or 0) * 1000:.1f} ms (p99)",
        flush=True,
    )
    server = ServerView(
        row.server_ttft_mean_s, row.server_queue_mean_s, row.server_prefill_mean_s, row.prefix_hit_ratio or 0.0
    )
    stamps = [
        Stamps(each.sent_s, each.sent_s + each.ttft_s, each.sent_s + each.e2e_s)
        for each in row.requests
        if each.ttft_s is not None and each.e2e_s is not None  # of each: all are successes
    ]
    return Turn(
        row.tok_s, row.p50_ttft_s, row.p50_tpot_s, row.mean_ttft_s, server, pace(stamps, load.concurrency)
    )  # fmt: skip


def _replay(client: Client, replay: Replay, session: Session, load: Load, endpoint: Endpoint, turn: int) -> Turn:
    with patch.object(client, "replay", replay):
        return _our_turn("ours with the peer's bodies", session, load, endpoint, turn)


if __name__ == "__main__":
    main()
