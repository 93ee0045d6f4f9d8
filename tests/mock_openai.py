"""An OpenAI-compatible server of completions and chats in a thread, that answers well or fails in a chosen way.

For tests of everything that talks to a server. It answers at once (no sleeps), counts the tokens of token-id prompts as
vLLM does, and remembers what it was asked.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from aiohttp import web

from workers.engines.sim_server import Counted


class Fault(StrEnum):
    """How an answer goes wrong."""

    NONE = "none"
    ERROR_MID_STREAM = "error_mid_stream"  # half the tokens, an error object, [DONE]
    NO_DONE = "no_done"  # everything but [DONE]
    BREAKS_OFF = "breaks_off"  # half the tokens, then an orderly end of the body
    SHORT = "short"  # half the tokens, else well-formed
    NO_USAGE = "no_usage"
    NO_FINISH_REASON = "no_finish_reason"
    ABORTED = "aborted"  # finish_reason "abort"
    STOPS_EARLY = "stops_early"  # half the tokens, finish_reason "stop"
    STATUS_503 = "status_503"
    NOT_JSON = "not_json"  # events that are no JSON
    NOT_A_STREAM = "not_a_stream"  # one JSON object with HTTP 200
    NOT_HTTP = "not_http"
    RESET = "reset"  # the connection dies after half the tokens
    NO_ANSWER = "no_answer"  # the connection dies before any answer
    HANG = "hang"  # half the tokens, then nothing
    PROMPT_CUT = "prompt_cut"  # usage counts one prompt token too few
    DELTA_NOT_OBJECT = "delta_not_object"  # of a chat: the second chunk's delta is a list
    ROLE_ONLY = "role_only"  # of a chat: nothing but the chunk that names the role
    UNKNOWN_FIELD = "unknown_field"  # refused for what vLLM alone takes


@dataclass
class MockOpenAI:
    """What the server does, and what it saw. Start it with `serving`."""

    faults: list[Fault] = field(default_factory=list)
    """Of the first requests, in the order they come; `fault` from then on."""
    fault: Fault = Fault.NONE
    gate: int = 1
    """Hold requests until so many are in flight, then let these go together."""
    models: tuple[str, ...] = ("mock",)
    models_body: str | None = None
    """Answer /v1/models with this text instead of a list."""
    models_status: int = 200
    completions_body: str | None = None
    """Answer requests with this text instead of completions."""
    completions_status: int = 200
    always_streams: bool = False
    """Whatever was asked for."""
    max_model_len: int | None = None
    """Named in /v1/models; longer requests are refused."""
    tokens_of_a_word: int | None = None
    """Answer /tokenize: every word is so many tokens."""
    template_tokens: int = 0
    """What a chat's template adds."""
    preface_s: float = 0.0
    """Between a chat's chunk that names the role and its first token."""
    tokens_per_chunk: int = 1
    api_key: str | None = None
    tls: ssl.SSLContext | None = None
    keepalive_s: float = 60.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: set[asyncio.Transport] = field(default_factory=set)
    in_flight: int = 0
    max_in_flight: int = 0
    hung_up: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released once for each request whose client closed the connection before the answer was whole."""
    hanging: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released once for each request that has come to its `HANG`."""
    counted: Counted = field(default_factory=Counted)
    """What /metrics says."""
    _barrier: asyncio.Barrier | None = None

    async def handle_models(self, request: web.Request) -> web.Response:
        if self.api_key is not None and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.models_body is not None or self.models_status != 200:
            return web.Response(text=self.models_body or "", status=self.models_status)
        entry = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        return web.json_response({"object": "list", "data": [{"id": name, **entry} for name in self.models]})

    async def handle_tokenize(self, request: web.Request) -> web.Response:
        if self.tokens_of_a_word is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        count = self.length(await request.json())
        return web.json_response({"count": count, "max_model_len": self.max_model_len, "tokens": [0] * count})

    def length(self, body: dict[str, Any]) -> int:
        """Tokens of a request's prompt."""
        each = self.tokens_of_a_word or 1
        if "messages" in body:
            return self.template_tokens + each * len(body["messages"][0]["content"].split())
        prompt = body["prompt"]
        return len(prompt) if isinstance(prompt, list) else each * len(prompt.split())

    async def handle_metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.counted.exposition(self.in_flight, 0, 0.0))

    async def handle_completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        assert isinstance(request.transport, asyncio.Transport)
        self.connections.add(request.transport)
        fault = self.faults.pop(0) if self.faults else self.fault
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            if self._barrier is not None:
                await self._barrier.wait()
            return await self._answer(request, body, fault)
        except (asyncio.CancelledError, ConnectionError):
            self.hung_up.release()
            raise
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any], fault: Fault) -> web.StreamResponse:
        assert request.transport is not None
        if self.completions_body is not None:
            return web.Response(text=self.completions_body, status=self.completions_status)
        if fault is Fault.STATUS_503:
            return web.Response(status=503, text="no capacity: " + "x" * 1000)
        if fault is Fault.UNKNOWN_FIELD and "ignore_eos" in body:
            return web.json_response({"error": {"message": "unrecognized field: ignore_eos"}}, status=400)
        if fault is Fault.NOT_A_STREAM:
            return web.json_response({"id": "c", "choices": [{"text": "a", "finish_reason": "length"}]})
        if fault is Fault.NOT_HTTP:
            request.transport.write(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")
            request.transport.close()
        if fault is Fault.NO_ANSWER:
            request.transport.abort()
        if self.max_model_len is not None and self.length(body) + body["max_tokens"] > self.max_model_len:
            return web.json_response({"error": {"message": "longer than max_model_len"}}, status=400)
        if not (body.get("stream") or self.always_streams):
            usage = {"prompt_tokens": self.length(body), "completion_tokens": body["max_tokens"]}
            return web.json_response({"id": "c", "choices": [{"finish_reason": "length"}], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        chat = "messages" in body
        if chat:
            preface = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            await response.write(f"data: {json.dumps({'id': 'c', 'choices': [preface]})}\n\n".encode())
            await asyncio.sleep(self.preface_s)
        half = max(1, body["max_tokens"] // 2)
        partial = (Fault.ERROR_MID_STREAM, Fault.BREAKS_OFF, Fault.RESET, Fault.HANG)
        total = half if fault in (*partial, Fault.SHORT, Fault.STOPS_EARLY) else body["max_tokens"]
        reason = {Fault.STOPS_EARLY: "stop", Fault.ABORTED: "abort", Fault.NO_FINISH_REASON: None}.get(fault, "length")
        sent = total if fault is Fault.ROLE_ONLY else 0
        while sent < total:
            count = min(self.tokens_per_chunk, total - sent)
            sent += count
            self.counted.generated.inc(count)
            last = sent == total and fault not in partial
            token: dict[str, Any] = {"delta": {"content": "a" * count}} if chat else {"text": "a" * count}
            if fault is Fault.DELTA_NOT_OBJECT and sent > count:
                token["delta"] = ["a"]
            choice = {"index": 0, **token, "finish_reason": reason if last else None}
            text = json.dumps({"id": "c", "choices": [choice], "usage": None})
            await response.write(f"data: {'<p>' if fault is Fault.NOT_JSON else text}\n\n".encode())
        if fault is Fault.RESET:
            request.transport.abort()
        if fault is Fault.HANG:
            self.hanging.release()
            await asyncio.Event().wait()
        if fault is Fault.ERROR_MID_STREAM:
            error = {"message": "EngineCore died", "type": "InternalServerError", "code": 500}
            await response.write(f"data: {json.dumps({'error': error})}\n\n".encode())
        if fault not in (*partial, Fault.NO_USAGE) and body.get("stream_options", {}).get("include_usage"):
            length = self.length(body) - (fault is Fault.PROMPT_CUT)
            usage = {"prompt_tokens": length, "completion_tokens": total, "total_tokens": length + total}
            await response.write(f"data: {json.dumps({'id': 'c', 'choices': [], 'usage': usage})}\n\n".encode())
        if fault not in (Fault.NO_DONE, Fault.BREAKS_OFF, Fault.RESET):
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def run(self, uds: str | None, started: threading.Event, stop: asyncio.Event) -> None:
        self._barrier = asyncio.Barrier(self.gate) if self.gate > 1 else None
        app = web.Application(client_max_size=2**28)
        app.router.add_get("/v1/models", self.handle_models)
        app.router.add_get("/metrics", self.handle_metrics)
        app.router.add_post("/v1/completions", self.handle_completions)
        app.router.add_post("/v1/chat/completions", self.handle_completions)
        app.router.add_post("/tokenize", self.handle_tokenize)
        runner = web.AppRunner(
            app, handler_cancellation=True, keepalive_timeout=self.keepalive_s, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        if uds is None:
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.tls).start()
            self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
        else:
            await web.UnixSite(runner, uds).start()
            self.url = "http://localhost"
        started.set()
        await stop.wait()
        await runner.cleanup()


@contextmanager
def serving(mock: MockOpenAI, uds: str | None = None) -> Iterator[MockOpenAI]:
    """Run `mock` on a loopback port (or on the Unix socket `uds`) in a thread while the block runs."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def work() -> None:
        try:
            loop.run_until_complete(mock.run(uds, started, stop))
        finally:
            loop.close()
            started.set()

    thread = threading.Thread(target=work, name="mock-openai", daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield mock
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
