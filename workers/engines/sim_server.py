"""The stand-in server: vLLM's HTTP face over a clock and a block counter. No model, no GPU; every figure is pretended.

Started as a process by `workers.engines.sim`. Decoding takes `step_s` a step for all running requests together, plus
`step_per_request_s` for each. A request waits until the blocks of its prompt are free and takes more as it grows; where
there are none, the youngest is preempted and waits again, as in vLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CARD_BYTES = 80 * 2**30


@dataclass(frozen=True, slots=True)
class Tables:
    """The block tables of one group of layers, and how many blocks a request holds in each of them."""

    count: int
    fewest: int
    """A state of linear attention is there from the first token on."""
    most: int
    """While it decodes: a sliding window frees the blocks that it has left behind."""
    most_computing: int
    """While its prompt is computed, whose tokens are all in flight."""

    def blocks(self, tokens: int, block_size: int, computing: bool) -> int:
        """Return those of `tokens` of one request."""
        most = self.most_computing if computing else self.most
        return self.count * min(max(-(-tokens // block_size), self.fewest), most)


@dataclass(slots=True)
class Pool:
    """KV blocks of the pretended card."""

    total: int
    block_size: int
    tables: tuple[Tables, ...]
    used: int = 0

    def blocks(self, tokens: int, computing: bool = False) -> int:
        """Return the blocks that `tokens` of one request take in the tables of all groups."""
        return sum(tables.blocks(tokens, self.block_size, computing) for tables in self.tables)


@dataclass(slots=True, eq=False)
class Place:
    """A request's place in the batch, and the blocks that it holds."""

    blocks: int = 0


STEP_BUCKETS = tuple(float(2**power) for power in (0, *range(3, 15)))
LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)


class Counted:
    """What a stand-in counts, under the names, types and buckets that vLLM has for it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.running = self._gauge("vllm:num_requests_running")
        self.waiting = self._gauge("vllm:num_requests_waiting")
        self.waiting_by_reason = self._gauge("vllm:num_requests_waiting_by_reason", "reason")
        self.waiting_by_reason.labels("deferred")  # there, and 0
        self.kv_usage = self._gauge("vllm:kv_cache_usage_perc")
        self.preemptions = self._counter("vllm:num_preemptions")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits")
        self.generated = self._counter("vllm:generation_tokens")
        self.step_tokens = self._histogram("vllm:iteration_tokens_total", STEP_BUCKETS)
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", TTFT_BUCKETS)
        self.queue = self._histogram("vllm:request_queue_time_seconds", LATENCY_BUCKETS)
        self.prefill = self._histogram("vllm:request_prefill_time_seconds", LATENCY_BUCKETS)
        self.decode = self._histogram("vllm:request_decode_time_seconds", LATENCY_BUCKETS)

    def _gauge(self, name: str, *labels: str) -> Gauge:
        return Gauge(name, name, labels, registry=self._registry)

    def _counter(self, name: str) -> Counter:
        return Counter(name, name, registry=self._registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, name, buckets=buckets, registry=self._registry)

    def exposition(self, running: int, waiting: int, kv_usage: float) -> str:
        """Return the answer to /metrics, with the gauges as they are now."""
        self.running.set(running)
        self.waiting.set(waiting)
        self.waiting_by_reason.labels("capacity").set(waiting)
        self.kv_usage.set(kv_usage)
        return generate_latest(self._registry).decode()


class Server:
    """State of one stand-in: who runs, who waits, what was counted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pool_bytes = options.kv_cache_memory_bytes or max(
            0, int(options.gpu_memory_utilization * CARD_BYTES) - options.weight_bytes - options.runtime_bytes
        )
        self.pool = Pool(self.pool_bytes // options.bytes_per_block, options.block_size, _read_tables(options.tables))
        self.batch: dict[Place, None] = {}
        """Those that run, the oldest first."""
        self.waiting = 0
        self.counted = Counted()
        self.torch_bytes = options.weight_bytes + self.pool_bytes
        self._cached: set[int] = set()
        self.key = os.environ.get("VLLM_API_KEY")
        self._room = asyncio.Condition()

    @property
    def max_concurrency(self) -> float:
        """Full-length sequences that the pool holds."""
        return float(self.pool.total / self.options.blocks_per_sequence)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self.batch)

    def step_s(self) -> float:
        """Return the seconds of one decoding step at the present batch."""
        return float(self.options.step_s + self.options.step_per_request_s * self.running)

    @property
    def free(self) -> int:
        """Blocks that a request can have: one, the null block, is nobody's."""
        return self.pool.total - 1 - self.pool.used

    @contextlib.asynccontextmanager
    async def admitted(self, tokens: int) -> AsyncIterator[Place]:
        """Wait for a place in the batch and for the prompt's blocks, and hold both; the value is the place.

        They are those of a prompt that is being computed; `computed` frees what is too much afterwards.
        """
        place = Place()
        await self._admit(place, tokens)
        try:
            yield place
        finally:
            if place in self.batch:
                self._release(place)
            async with self._room:
                self._room.notify_all()

    async def grow(self, place: Place, tokens: int) -> None:
        """Let a request hold the blocks of `tokens`: the youngest are preempted for them, at last itself."""
        needed = self.pool.blocks(tokens)
        while place in self.batch and needed - place.blocks > self.free:
            self._release(next(reversed(self.batch)))
            self.counted.preemptions.inc()
        if place in self.batch:
            self.pool.used += needed - place.blocks
            place.blocks = needed
        else:
            await self._admit(place, tokens)
            await self.computed(place, tokens)

    async def computed(self, place: Place, tokens: int) -> None:
        """Free what a request of `tokens` held only while they were computed."""
        if place not in self.batch:  # preempted meanwhile
            return
        self.pool.used -= place.blocks
        place.blocks = self.pool.blocks(tokens)
        self.pool.used += place.blocks
        async with self._room:
            self._room.notify_all()

    async def _admit(self, place: Place, tokens: int) -> None:
        blocks = self.pool.blocks(tokens, computing=True)
        self.waiting += 1
        async with self._room:
            await self._room.wait_for(lambda: self.running < self.options.max_num_seqs and blocks <= self.free)
            self.waiting -= 1
            self.batch[place] = None
            place.blocks = blocks
            self.pool.used += blocks
        self.write_state()

    def _release(self, place: Place) -> None:
        del self.batch[place]
        self.pool.used -= place.blocks
        place.blocks = 0
        self.write_state()

    def look_up(self, prompt: list[Any]) -> None:
        """Look for the prompt's whole blocks in the prefix cache, as vLLM does, and put them there: none is evicted."""
        self.counted.prefix_queries.inc(len(prompt))
        size, key, hit = self.pool.block_size, 0, True
        for start in range(0, len(prompt) - size, size):  # the last token is always computed
            key = hash((key, tuple(prompt[start : start + size])))
            hit = hit and key in self._cached
            self.counted.prefix_hits.inc(size * hit)
            self._cached.add(key)

    def write_state(self) -> None:
        """Say what is allocated, for the pretended device."""
        used = self.options.runtime_bytes + self.torch_bytes
        state = {"pid": os.getpid(), "memory_used_bytes": used, "utilization_pct": 100.0 if self.running else 0.0}
        path = Path(self.options.state)
        temporary = path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(state))
            temporary.replace(path)

    # --- HTTP ---

    async def health(self, request: web.Request) -> web.Response:
        """Answer 200."""
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        """Answer as vLLM's /v1/models does."""
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        entry = {"id": self.options.model, "object": "model", "max_model_len": self.options.max_model_len}
        return web.json_response({"object": "list", "data": [entry]})

    async def metrics(self, request: web.Request) -> web.Response:
        """Answer with the names that vLLM uses."""
        usage = self.pool.used / self.pool.total if self.pool.total else 0.0
        tokens = int(self.max_concurrency * self.options.max_model_len)
        labels = (
            f'block_size="{self.pool.block_size}",num_gpu_blocks="{self.pool.total}",'
            f'kv_cache_size_tokens="{tokens}",kv_cache_max_concurrency="{self.max_concurrency}",'
            f'kv_cache_memory_bytes="{self.pool_bytes}"'
        )
        text = self.counted.exposition(self.running, self.waiting, usage)
        return web.Response(text=f"{text}vllm:cache_config_info{{{labels}}} 1\n")

    async def worker_call(self, request: web.Request) -> web.Response:
        """Answer as vLLM's workers do with our extension: an allocator of weights and pool, a runtime beside it."""
        called: dict[str, Any] = await request.json()
        if called["method"] == "give_back_memory":
            self.torch_bytes = 0
            self.write_state()
            answer = {"reserved": self.torch_bytes}
        else:
            answer = {"weights": self.options.weight_bytes, "kv": self.pool_bytes, "graphs": 0, "buffers": 0}
            answer |= {"cached": 0, "reserved": self.torch_bytes}
            answer |= {"outside": self.options.runtime_bytes, "outside_at_init": 0}
        return web.json_response({"results": [answer] * self.options.ranks})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        """Empty the prefix cache, and answer as vLLM 0.32 does: it cannot while requests hold blocks."""
        if not self.pool.used:
            self._cached.clear()
        return web.json_response({"success": not self.pool.used})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Stream as many tokens as were asked for; of a chat, as vLLM does, behind a chunk that names the role."""
        body: dict[str, Any] = await request.json()
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        prompt, asked = prompt if isinstance(prompt, list) else prompt.split(), int(body["max_tokens"])
        if len(prompt) + asked > self.options.max_model_len:
            return web.json_response({"error": {"message": "longer than max_model_len"}}, status=400)
        self.look_up(prompt)
        arrived = time.monotonic()
        async with self.admitted(len(prompt)) as place:
            scheduled = time.monotonic()
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            # Admitted together, prefilled together, and that step gives each its first token.
            self.counted.step_tokens.observe((len(prompt) + 1) * self.running)
            await asyncio.sleep(len(prompt) * self.options.prefill_s_per_token)
            await self.computed(place, len(prompt))
            first = last = scheduled
            for index in range(asked):
                await asyncio.sleep(self.step_s())
                await self.grow(place, len(prompt) + index)
                if index and place is next(iter(self.batch)):  # a step is everybody's: the oldest counts it
                    self.counted.step_tokens.observe(self.running)
                self.counted.generated.inc()
                last = time.monotonic()
                first = first if index else last
                if chat and not index:
                    preface = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    await _event(response, {"choices": [preface]})
                reason = "length" if index + 1 == asked else None
                token = {"delta": {"content": " x"}} if chat else {"text": " x"}
                await _event(response, {"choices": [{"index": 0, **token, "finish_reason": reason}]})
            usage = {"prompt_tokens": len(prompt), "completion_tokens": asked, "total_tokens": len(prompt) + asked}
            await _event(response, {"choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
            self.counted.queue.observe(scheduled - arrived)
            self.counted.prefill.observe(first - scheduled)
            self.counted.decode.observe(last - first)
            self.counted.ttft.observe(first - arrived)
        return response


def _read_tables(words: str) -> tuple[Tables, ...]:
    return tuple(Tables(*numbers) for numbers in json.loads(words))


async def _event(response: web.StreamResponse, content: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(content).encode() + b"\n\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the stand-in's options."""
    parser = argparse.ArgumentParser(description="A stand-in for vLLM: simulated.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--state", required=True, help="file that says what is allocated")
    parser.add_argument("--uds")
    parser.add_argument("--port", type=int)
    for name in (
        "max-model-len",
        "bytes-per-block",
        "block-size",
        "blocks-per-sequence",
        "max-num-seqs",
    ):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--tables", required=True, help="JSON: the fields of `Tables`, for each group of layers")
    for name in ("weight-bytes", "runtime-bytes", "ranks"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float, required=True)
    parser.add_argument("--start-s", type=float, default=0.2, help="seconds until it listens")
    parser.add_argument("--step-s", type=float, default=0.002, help="seconds of a decoding step")
    parser.add_argument(
        "--step-per-request-s", type=float, default=0.0002, help="more seconds for each running request"
    )
    parser.add_argument("--prefill-s-per-token", type=float, default=0.000002)
    parser.add_argument("--fail", help="end before listening, with this line on standard error")
    parser.add_argument("--fail-on", help="do so on this card alone")
    return parser.parse_args(argv)


async def serve(options: argparse.Namespace) -> None:
    """Listen until SIGTERM."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = Server(options)
    server.write_state()
    app = web.Application(client_max_size=2**26)
    app.add_routes(
        [
            web.get("/health", server.health),
            web.get("/v1/models", server.models),
            web.get("/metrics", server.metrics),
            web.post("/v1/completions", server.completions),
            web.post("/v1/chat/completions", server.completions),
        ]
    )
    if options.uds:
        app.router.add_post("/collective_rpc", server.worker_call)
        app.router.add_post("/reset_prefix_cache", server.reset_prefix_cache)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.UnixSite(runner, options.uds) if options.uds else web.TCPSite(runner, "127.0.0.1", options.port)
    await site.start()
    await ended.wait()
    await runner.cleanup()


def main() -> None:
    """Entry of the process."""
    options = parse(sys.argv[1:])
    print(f"simulated server with CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    time.sleep(options.start_s)
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if options.fail and (options.fail_on is None or options.fail_on in cards):
        raise SystemExit(options.fail)
    try:
        asyncio.run(serve(options))
    finally:
        Path(options.state).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
