"""One run of one client against the truth server, as a process of its own on one core; prints its figures as JSON.

    clients.py ours|floor|bench PORT CORE STREAMS ROUNDS TOKENS MODEL_DIR RATE

A RATE above 0 (requests a second) makes it a Poisson open loop; else STREAMS requests are in flight. `floor` is what
Python can do at all: raw sockets, every read stamped and kept, nothing parsed.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import sys
import time
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from contract.arrivals import ArrivalProcess, Arrivals, Stage

if TYPE_CHECKING:
    from workers.load.plan import LoadPlan, LoadResult

PROMPT_TOKENS = 16


def poisson_s(rate: float, requests: int, seed: str) -> list[float]:
    """Return when so many requests are due, from the first on."""
    return list(Arrivals(ArrivalProcess.POISSON, rate, (Stage(1),)).times(requests, seed))


def said(plan: LoadPlan, result: LoadResult) -> list[tuple[Any, ...]]:
    """Return what our client says of each request: (its body's CRC-32, when due, sent, first and last chunk, gaps).

    In seconds, on the monotonic clock.
    """
    from workers.load.bodies import prepare

    crcs = {each.ordinal: zlib.crc32(each.body) for each in prepare(plan) if each is not None}
    from_s = result.started_monotonic_s
    return [
        (
            crcs[row.ordinal],
            None if row.due_s is None else from_s + row.due_s,
            from_s + row.sent_s,
            from_s + row.sent_s + (row.ttft_s or 0),
            from_s + row.sent_s + (row.e2e_s or 0),
            [gap / 1e6 for gap in row.gaps_us],
        )
        for row in result.requests
    ]


def ours(port: int, streams: int, rounds: int, tokens: int, rate: float) -> dict[str, Any]:
    """Our client as the tool uses it."""
    from workers.load.client import generate
    from workers.load.endpoint import Endpoint
    from workers.load.limits import client_limits
    from workers.load.plan import LoadPlan

    endpoint = Endpoint(f"http://127.0.0.1:{port}", "truth")
    requests = streams * rounds
    due_s = poisson_s(rate, requests, "truth") if rate else []
    plan = LoadPlan(endpoint, streams, requests, PROMPT_TOKENS, tokens, 0, 32_000, 0, 60.0, due_s=tuple(due_s))
    result = generate(plan)
    failed = [row for row in result.requests if not row.ok]
    assert not failed, failed[0]
    streamed = sum(row.completion_tokens or 0 for row in result.requests)
    cpu_s = result.clients[0].cpu_share * result.duration_s
    gaps = np.concatenate([row.gaps_us for row in result.requests]) / 1000
    return {
        "tok_s": streamed / result.duration_s,
        "arrivals_s": due_s[-1] if rate else 0,
        "us_window": cpu_s / streamed * 1e6,
        "us_all": (cpu_s + result.judging_cpu_s) / streamed * 1e6,
        "ttft_ms": float(np.median([row.ttft_s or 0 for row in result.requests])) * 1000,
        "gap_p50_ms": float(np.percentile(gaps, 50)),
        "gap_p99_ms": float(np.percentile(gaps, 99)),
        "limits": client_limits(result),
        "said": said(plan, result),
    }


def floor(port: int, streams: int, rounds: int, tokens: int, rate: float) -> dict[str, Any]:
    """Raw non-blocking sockets on epoll; every connection is kept, and is made before the first send."""
    body = json.dumps({"prompt": list(range(PROMPT_TOKENS)), "max_tokens": tokens}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: l\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    poll, open_sockets = select.epoll(), {}
    for _ in range(streams * 3 // 2 if rate else streams):
        one = socket.create_connection(("127.0.0.1", port))
        one.setblocking(False)
        poll.register(one, select.EPOLLIN)
        open_sockets[one.fileno()] = one
    due = poisson_s(rate, streams * rounds, "truth")[::-1] if rate else [0.0] * streams * rounds
    arrivals_s = due[0]
    left, idle = len(due), list(open_sockets)
    kept: list[tuple[int, float, bytes | None]] = []
    started, cpu = time.monotonic(), time.thread_time()
    while left:
        now = time.monotonic()
        while due and idle and started + due[-1] <= now:
            due.pop()
            number = idle.pop()
            kept.append((number, now, None))
            open_sockets[number].send(request)
            now = time.monotonic()
        wait = max(started + due[-1] - now, 0.0) if due and idle else 1.0
        for number, _ in poll.poll(wait, 64):
            data = open_sockets[number].recv(2**16)
            kept.append((number, time.monotonic(), data))
            if data.endswith(b"0\r\n\r\n"):
                left -= 1
                idle.append(number)
    cpu, duration = time.thread_time() - cpu, time.monotonic() - started
    last: dict[int, float] = {}
    sent: dict[int, float] = {}
    ttft, gaps = [], []
    for number, at, data in kept:
        if data is None:
            sent[number] = at
            last.pop(number, None)
            continue
        if number in last:
            gaps.append(at - last[number])
        else:
            ttft.append(at - sent[number])
        last[number] = at
    streamed = streams * rounds * tokens
    return {
        "tok_s": streamed / duration, "arrivals_s": arrivals_s, "us_window": cpu / streamed * 1e6,
        "us_all": cpu / streamed * 1e6, "ttft_ms": float(np.median(ttft)) * 1000,
        "gap_p50_ms": float(np.percentile(gaps, 50)) * 1000, "gap_p99_ms": float(np.percentile(gaps, 99)) * 1000,
    }  # fmt: skip


def bench(port: int, streams: int, rounds: int, tokens: int, rate: float, model: str) -> dict[str, Any]:
    """`vllm bench serve`, its CPU time taken from its first send to its last answer.

    A round of warm-up makes its connections first, as ours and the floor's are made before the window.
    """
    import argparse
    import contextlib
    import io

    from vllm.benchmarks import serve
    from vllm.benchmarks.lib import endpoint_request_func

    calls, marks = 0, [0.0, 0.0]
    asked = endpoint_request_func.ASYNC_REQUEST_FUNCS["openai"]

    async def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == streams + 1:
            marks[0] = time.process_time()
        try:
            return await asked(*arguments, **named)
        finally:
            marks[1] = time.process_time()

    for module in (serve, endpoint_request_func):
        module.ASYNC_REQUEST_FUNCS["openai"] = timed
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    options = {
        "backend": "openai", "base-url": f"http://127.0.0.1:{port}", "model": model, "served-model-name": "truth",
        "dataset-name": "random", "random-input-len": PROMPT_TOKENS, "random-output-len": tokens,
        "num-prompts": streams * rounds, "num-warmups": streams,
        **({"request-rate": rate} if rate else {"max-concurrency": streams}),
        "percentile-metrics": "ttft,itl", "metric-percentiles": "50,99",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):
        done = asyncio.run(serve.main_async(parser.parse_args([*words, "--ignore-eos", "--disable-tqdm"])))
    assert done["completed"] == streams * rounds, done
    streamed = done["total_output_tokens"]
    cpu = (marks[1] - marks[0]) / streamed * 1e6
    return {
        "tok_s": done["output_throughput"], "arrivals_s": streams * rounds / rate if rate else 0,
        "us_window": cpu, "us_all": cpu, "ttft_ms": done["median_ttft_ms"],
        "gap_p50_ms": done["median_itl_ms"], "gap_p99_ms": done["p99_itl_ms"], "warmups": streams,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Entry of the process."""
    name, port, core, streams, rounds, tokens, model, rate = arguments
    os.sched_setaffinity(0, {int(core)})
    numbers = int(port), int(streams), int(rounds), int(tokens), float(rate)
    figures = bench(*numbers, model) if name == "bench" else {"ours": ours, "floor": floor}[name](*numbers)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
