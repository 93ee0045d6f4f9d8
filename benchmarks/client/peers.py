"""Other tools against the truth server: GuideLLM, AIPerf and inference-perf, as their consoles on PATH run them.

`run.py` calls `measure`. What a tool says of itself is taken for its gaps and TTFT alone: tokens and their rate are the
server's log's, and CPU is that of the tool's whole tree of processes, read ten times a second from outside and, by the
times in that log, from the first request that came to the last token that was written.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LOOK_S = 0.1
LIMIT_S = 600
PROMPT_TOKENS = 16
END = "<end>"
ANSWER = "Ġ8081"
"""The text of `truth_server.py`'s tokens, its space as tokenizers write it."""


@dataclass(frozen=True)
class Job:
    """What a tool is to do, and where its files are."""

    port: int
    streams: int
    requests: int
    tokens: int
    directory: Path
    """Empty; `tokenizer` beside what the tool writes."""

    @property
    def url(self) -> str:
        """Of the server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def tokenizer(self) -> Path:
        """A model's directory with a tokenizer alone."""
        return self.directory / "tokenizer"


def _guidellm(job: Job) -> list[str]:
    backend = f"kind=openai_http,target={job.url},model=truth,request_format=/v1/completions"
    return [
        "run", "--backend", backend, "--profile", f"kind=concurrent,streams={job.streams}",
        "--constraint", f"kind=max_requests,count={job.requests}",
        "--tokenizer", f"kind=huggingface_auto,model={job.tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={job.tokens}",
        "--output", f"kind=json,path={job.directory}/said.json", "--disable-console",
    ]  # fmt: skip


def _guidellm_says(job: Job) -> tuple[float, float, float]:
    metrics = json.loads((job.directory / "said.json").read_text())["benchmarks"][0]["metrics"]
    gaps = metrics["inter_token_latency_ms"]["successful"][
        "percentiles"
    ]  # means of requests, weighted: it has no other
    return gaps["p50"], gaps["p99"], metrics["time_to_first_token_ms"]["successful"]["percentiles"]["p50"]


def _aiperf(job: Job) -> list[str]:
    options = {
        "model": "truth", "url": job.url, "endpoint-type": "completions", "tokenizer": job.tokenizer,
        "concurrency": job.streams, "request-count": job.requests, "prompt-input-tokens-mean": PROMPT_TOKENS,
        "prompt-output-tokens-mean": job.tokens, "extra-inputs": "ignore_eos:true",
        "output-artifact-dir": job.directory, "ui-type": "none",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["profile", *words, "--streaming", "--use-legacy-max-tokens", "--no-gpu-telemetry", "--no-server-metrics"]


def _aiperf_says(job: Job) -> tuple[float, float, float]:
    said = json.loads((job.directory / "profile_export_aiperf.json").read_text())
    gaps = said["inter_chunk_latency"]  # its inter_token_latency is a mean of each request
    return gaps["p50"], gaps["p99"], said["time_to_first_token"]["p50"]


def _inference_perf(job: Job) -> list[str]:
    def fixed(length: int) -> dict[str, int]:
        return {"min": length, "max": length, "mean": length, "std_dev": 0, "total_count": job.requests}

    stage = {"num_requests": job.requests, "concurrency_level": job.streams}
    config = {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "random", "input_distribution": fixed(PROMPT_TOKENS), "output_distribution": fixed(job.tokens),
        },
        "load": {
            "type": "concurrent", "num_workers": 1, "worker_max_concurrency": job.streams, "interval": 0,
            "stages": [stage],
        },
        "server": {"type": "vllm", "model_name": "truth", "base_url": job.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(job.tokenizer)},
        "report": {"request_lifecycle": {"percentiles": [50, 99]}},
        "storage": {"local_storage": {"path": str(job.directory)}},
    }  # fmt: skip
    path = job.directory / "config.yml"
    path.write_text(json.dumps(config))
    return ["-c", str(path)]


def _inference_perf_says(job: Job) -> tuple[float, float, float]:
    latency = json.loads((job.directory / "summary_lifecycle_metrics.json").read_text())["successes"]["latency"]
    gaps, ttft = latency["inter_token_latency"], latency["time_to_first_token"]
    return gaps["median"] * 1000, gaps["p99"] * 1000, ttft["median"] * 1000


PEERS: dict[str, tuple[Callable[[Job], list[str]], Callable[[Job], tuple[float, float, float]]]] = {
    "guidellm": (_guidellm, _guidellm_says),
    "aiperf": (_aiperf, _aiperf_says),
    "inference-perf": (_inference_perf, _inference_perf_says),
}
"""By console: the words that start it, and the p50 and p99 gap and median TTFT, ms, that it says afterwards."""


@dataclass(frozen=True)
class Measured:
    """What was seen of one run of a tool."""

    said_ms: tuple[float, float, float]
    looks: list[tuple[float, float]]
    """(monotonic seconds, CPU seconds of the whole tree by then); the last is of its end."""

    def figures(self, requests: list[tuple[float, list[float]]]) -> dict[str, Any]:
        """Return what `run.py` prints, by the server's log of the run."""
        first_s, last_s = min(read for read, _ in requests), max(writes[-1] for _, writes in requests)
        tokens = sum(len(writes) for _, writes in requests)
        times, cpu_s = zip(*self.looks, strict=True)
        before_s, by_last_s = np.interp([first_s, last_s], times, cpu_s)
        gap_p50_ms, gap_p99_ms, ttft_ms = self.said_ms
        return {
            "tok_s": tokens / (last_s - first_s), "us_window": float(by_last_s - before_s) / tokens * 1e6,
            "us_all": float(cpu_s[-1] - before_s) / tokens * 1e6,
            "gap_p50_ms": gap_p50_ms, "gap_p99_ms": gap_p99_ms, "ttft_ms": ttft_ms,
        }  # fmt: skip


def measure(name: str, console: str, job: Job, core: int) -> Measured:
    """Run a tool on one core. Exits with its last words where it fails or says nothing."""
    words, says = PEERS[name]
    _write_tokenizer(job.tokenizer)
    # Neither is meant for other tools: AIPerf takes no tokenizer from a directory where the hub is switched off.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    log = job.directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [console, *words(job)], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            cwd=job.directory, env=environment, start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
    try:
        looks = _watch(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        said = says(job)
    except (OSError, LookupError, TypeError, ValueError) as error:
        sys.exit(f"{name} failed ({error!r}):\n{log.read_text(errors='replace')[-3000:]}")
    return Measured(said, looks)


def _watch(pid: int) -> list[tuple[float, float]]:
    """Read a tree's CPU time until its root has ended; the last is the system's count of all that was waited for."""
    root, looks, deadline_s = psutil.Process(pid), [(time.monotonic(), 0.0)], time.monotonic() + LIMIT_S
    while True:
        ended, _, usage = os.wait4(pid, os.WNOHANG)
        cpu_s = usage.ru_utime + usage.ru_stime if ended else _cpu_s(root)
        looks.append((time.monotonic(), max(cpu_s, looks[-1][1])))
        if ended:
            return looks
        if time.monotonic() > deadline_s:
            sys.exit(f"no end within {LIMIT_S} s")
        time.sleep(LOOK_S)


def _cpu_s(root: psutil.Process) -> float:
    """Of a process, of all below it, and of those among them that have ended."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for one in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += sum(one.cpu_times()[:4])
    return total


def _write_tokenizer(directory: Path) -> None:
    """Make one to which a letter is a token: so the tools' prose has tokens, and random tokens are a text of as many.

    What the server writes is one token, too: inference-perf counts tokens by the text of a chunk.
    """
    directory.mkdir()
    letters = ["Ġ", *string.ascii_letters, *string.digits, *string.punctuation]  # the first: a space
    merges = [(ANSWER[:at], ANSWER[at]) for at in range(1, len(ANSWER))]
    tokens = [END, *letters, *(begun + letter for begun, letter in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(kind))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(vocabulary)}))
