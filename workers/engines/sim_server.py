"""The stand-in server: vLLM's HTTP face over a clock and a block counter. No model, no GPU; every figure is pretended.

Started as a process by `workers.engines.sim`. Decoding takes `step_s` a step for all running requests together, plus
`step_per_request_s` for each; a request waits until the blocks of its whole length are free. It never preempts.
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

CARD_BYTES = 80 * 2**30


@dataclass(slots=True)
class Pool:
    """KV blocks of the pretended card."""

    total: int
    block_size: int
    used: int = 0

    def blocks(self, tokens: int) -> int:
        """Return the blocks that `tokens` of one request take."""
        return -(-tokens // self.block_size)


class Server:
    """State of one stand-in: who runs, who waits, what was counted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pool_bytes = options.kv_cache_memory_bytes or max(
            0, int(options.gpu_memory_utilization * CARD_BYTES) - options.weight_bytes - options.runtime_bytes
        )
        self.pool = Pool(self.pool_bytes // options.bytes_per_block, options.block_size)
        self.running = self.waiting = self.generated = self.queried = 0
        self.torch_bytes = options.weight_bytes + self.pool_bytes
        self.steps: list[int] = []
        self.key = os.environ.get("VLLM_API_KEY")
        self._room = asyncio.Condition()

    @property
    def max_concurrency(self) -> float:
        """Full-length sequences that the pool holds."""
        return float(self.pool.total / self.options.blocks_per_sequence)

    def step_s(self) -> float:
        """Return the seconds of one decoding step at the present batch."""
        return float(self.options.step_s + self.options.step_per_request_s * self.running)

    @contextlib.asynccontextmanager
    async def admitted(self, tokens: int) -> AsyncIterator[None]:
        """Wait for a place in the batch and for the request's blocks, and hold both."""
        blocks = self.pool.blocks(tokens)
        self.waiting += 1
        async with self._room:
            await self._room.wait_for(
                lambda: self.running < self.options.max_num_seqs and self.pool.used + blocks <= self.pool.total
            )
            self.waiting -= 1
            self.running += 1
            self.pool.used += blocks
        self.write_state()
        try:
            yield
        finally:
            self.running -= 1
            self.pool.used -= blocks
            self.write_state()
            async with self._room:
                self._room.notify_all()

    def write_state(self) -> None:
        """Say what is allocated, for the pretended device."""
        used = self.options.runtime_bytes + self.torch_bytes
        state = {"memory_used_bytes": used, "utilization_pct": 100.0 if self.running else 0.0}
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
        lines = [
            f"vllm:num_requests_running {self.running}",
            f"vllm:num_requests_waiting {self.waiting}",
            f"vllm:kv_cache_usage_perc {usage}",
            "vllm:num_preemptions_total 0",
            f"vllm:prefix_cache_queries_total {self.queried}",
            "vllm:prefix_cache_hits_total 0",
            f"vllm:generation_tokens_total {self.generated}",
            f"vllm:cache_config_info{{{labels}}} 1",
        ]
        for bound in (1, 64, 512, 2048, 16384):
            count = sum(step <= bound for step in self.steps)
            lines.append(f'vllm:iteration_tokens_total_bucket{{le="{bound}"}} {count}')
        return web.Response(text="\n".join(lines) + "\n")

    async def worker_call(self, request: web.Request) -> web.Response:
        """Answer as vLLM's workers do with our extension: an allocator that holds weights and pool, nothing else."""
        called: dict[str, Any] = await request.json()
        if called["method"] == "give_back_memory":
            self.torch_bytes = 0
            self.write_state()
            answer = {"reserved": self.torch_bytes}
        else:
            answer = {"weights": self.options.weight_bytes, "kv": self.pool_bytes, "graphs": 0, "buffers": 0}
            answer |= {"cached": 0, "reserved": self.torch_bytes}
        return web.json_response({"results": [answer] * self.options.ranks})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """Stream as many tokens as were asked for; of a chat, as vLLM does, behind a chunk that names the role."""
        body: dict[str, Any] = await request.json()
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        asked = int(body["max_tokens"])
        prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        if prompt_tokens + asked > self.options.max_model_len:
            return web.json_response({"error": {"message": "longer than max_model_len"}}, status=400)
        self.queried += prompt_tokens
        async with self.admitted(prompt_tokens + asked):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            self.steps.append(prompt_tokens * self.running)  # those admitted together are prefilled together
            await asyncio.sleep(prompt_tokens * self.options.prefill_s_per_token)
            for index in range(asked):
                await asyncio.sleep(self.step_s())
                self.generated += 1
                if chat and not index:
                    preface = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    await _event(response, {"choices": [preface]})
                reason = "length" if index + 1 == asked else None
                token = {"delta": {"content": " x"}} if chat else {"text": " x"}
                await _event(response, {"choices": [{"index": 0, **token, "finish_reason": reason}]})
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": asked, "total_tokens": prompt_tokens + asked}
            await _event(response, {"choices": [], "usage": usage})
            await response.write(b"data: [DONE]\n\n")
        return response


async def _event(response: web.StreamResponse, content: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(content).encode() + b"\n\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the stand-in's options."""
    parser = argparse.ArgumentParser(description="A stand-in for vLLM: simulated.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--state", required=True, help="file that says what is allocated")
    parser.add_argument("--uds")
    parser.add_argument("--port", type=int)
    for name in ("max-model-len", "bytes-per-block", "block-size", "blocks-per-sequence", "max-num-seqs"):
        parser.add_argument(f"--{name}", type=int, required=True)
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
    if options.fail:
        raise SystemExit(options.fail)
    try:
        asyncio.run(serve(options))
    finally:
        Path(options.state).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
