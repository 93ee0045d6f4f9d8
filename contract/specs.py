"""What the driver sends to a session: one server configuration and the points to measure on it.

Made by `orchestrator.plan`, carried out by `workers.session`. Frozen values only, so that they can be hashed
(`content_id`), pickled to another node and written to the manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from contract.arrivals import Arrivals
from contract.lengths import Lengths

WORKLOAD_VERSION = 2
"""Raised whenever the way a point is measured changes: part of every point's content hash."""


class Mode(StrEnum):
    """How the server's KV pool is sized."""

    COMMITTED = "committed"  # --kv-cache-memory-bytes for a stated number of full-length sequences
    UTILIZATION = "utilization"  # --gpu-memory-utilization, the tutorial's flags


class Start(StrEnum):
    """How a server's process comes to be."""

    COLD = "cold"  # a fresh interpreter, as a user starts it
    WARM = "warm"  # forked from a process of the run that has imported vLLM; cold where that cannot be


class PointKind(StrEnum):
    """What a point measures."""

    MEMORY = "memory"  # memory of one server: ready, after a warm-up load, at peak
    LOAD = "load"  # one load level of one repeat, closed loop or open


class Purpose(StrEnum):
    """Which table a point belongs to."""

    KV_SCALING = "kv_scaling"  # kv_cache_scaling.csv (committed) and kv_capacity.csv (utilization)
    COMPARISON = "comparison"  # batching_benchmark.md: the same requests one by one, then concurrently
    BATCHING = "batching"  # batching_benchmark.md: the table of levels
    CONCURRENCY = "concurrency"  # concurrency_sweep.csv
    RATE = "rate"  # rate_sweep.csv: open loop
    NEAR_FULL_CONTEXT = "near_full_context"  # the ladder whose prompts almost fill max_model_len
    ANCHOR = "anchor"  # a level that is repeated while a session lives: its drift
    CONTROL = "control"  # the anchor's level with no other session on its host: what neighbours cost
    ENVELOPE = "envelope"  # envelope_sweep.md: lengths x concurrency against the KV pool


class Api(StrEnum):
    """What a load asks of the server."""

    COMPLETIONS = "completions"  # token ids to /v1/completions: lengths are exact
    CHAT = "chat"  # one user message of text to /v1/chat/completions: the server's template adds to it


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Beginnings that prompts share: the `n`-th request of a level begins as all of group `n % groups` do.

    Raises:
        ValueError: a count is below 1.
    """

    groups: int
    tokens: int
    """Of each prefix; they count as tokens of the prompt."""

    def __post_init__(self) -> None:
        if self.groups < 1 or self.tokens < 1:
            raise ValueError(f"groups {self.groups} and tokens {self.tokens} of a shared prefix must be at least 1")

    def __str__(self) -> str:
        return f"{self.groups} shared prefixes of {self.tokens} tokens"


METRICS = {
    "mean_e2e_s": None, "p50_e2e_s": 0.5, "p95_e2e_s": 0.95,
    "mean_ttft_s": None, "p50_ttft_s": 0.5, "p95_ttft_s": 0.95,
}  # fmt: skip
"""Metrics that can end a level, with the quantile that each is; the mean is none."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A level goes on until half the 95 % interval of a metric of E2EL or TTFT is at most a share of the metric.

    Ending at the first look at which it is makes that less than 95 % sure (`benchmarks/stopping_truth.py`).

    Raises:
        ValueError: another metric, or a share that is not above 0.
    """

    metric: str
    """One of `METRICS`."""
    within: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"{self.metric!r}: must be one of {', '.join(METRICS)}")
        if not 0 < self.within < math.inf:
            raise ValueError(f"within is {self.within:g}: must be above 0")

    def __str__(self) -> str:
        return f"{self.metric} within {self.within:.1%}"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as vLLM will load it: a shape (generated config, dummy weights) or ordinary weights.

    `config` is the Hugging Face config.json content (for a multimodal checkpoint, with its `text_config`).
    """

    name: str
    config: dict[str, Any] = field(hash=False)
    dummy_weights: bool
    path: str | None = None
    """Directory or hub name handed to vLLM; None for a shape, whose directory the session makes."""
    revision: str | None = None
    cut: str | None = None
    """For a shape that is smaller than its original: what was cut, in words."""

    @property
    def is_moe(self) -> bool:
        """Mixture of experts: with dummy weights routing, and so speed, is not representative."""
        text = self.config.get("text_config") or self.config
        return any(text.get(key) for key in ("num_experts", "n_routed_experts", "num_local_experts"))

    @property
    def vocab_size(self) -> int:
        """Number of token ids (from config.json)."""
        text = self.config.get("text_config") or self.config
        return int(text["vocab_size"])


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One server's arguments, every `auto` resolved. None means: leave it to vLLM's own default."""

    max_model_len: int
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    """Per GPU."""
    kv_cache_dtype: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    dtype: str = "auto"
    quantization: str | None = None
    transport: str = "uds"
    """`uds` (a socket in a 0700 directory) or `tcp` (loopback, with a key made for the session)."""
    extra_args: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. Not part of any content hash: they decide whether a number comes, never which."""

    ready_s: float = 1800.0
    stop_grace_s: float = 15.0
    memory_back_s: float = 30.0
    request_s: float = 600.0
    point_s: float = 3600.0
    """A point that is estimated at more than a third of it has three times its estimate (`orchestrator.driver`)."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement on a live server. `id` is the content hash of what moves its number."""

    id: str
    kind: PointKind
    purpose: Purpose
    sweep: str
    concurrency: int = 0
    """Requests in flight (closed loop); 0 for a memory point and for an open loop."""
    num_requests: int = 0
    prompt_tokens: Lengths = 0
    output_tokens: Lengths = 0
    warmup_requests: int = 0
    """Of a round of the warm-up: sent at the level's own concurrency or rate, and discarded."""
    repeat: int = 0
    seed: int = 0
    estimate_s: float = 0.0
    api: Api = Api.COMPLETIONS
    shared_prefix: SharedPrefix | None = None
    arrivals: Arrivals | None = None
    """Of an open loop; None: closed loop."""
    seconds: float | None = None
    """Of a closed loop that is ended by time: until its last send."""
    precision: Precision | None = None
    """Ends it earlier, after `num_requests`."""


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """One server configuration on `gpus` GPUs, and its points in the order they are measured."""

    id: str
    model: ModelSpec
    server: ServerSpec
    engine: str
    """`vllm` or `sim`."""
    device: str
    """`cuda`, `cpu` or `sim`: what memory, utilisation and power are read from."""
    mode: Mode
    gpus: int
    sequences: int | None
    """Committed mode: the full-length sequences the pool was sized for."""
    points: tuple[Point, ...]
    timeouts: Timeouts = Timeouts()
    start_estimate_s: float = 60.0
    start: Start = Start.COLD
    """No part of any content hash: it decides how long a start takes, never what is measured."""
    searched_estimate_s: float = 0.0
    """Of the points that searches may add."""
    load_processes: int | None = None
    """Processes that send a level; None: as many as the level needs. Like time-outs, no part of any content hash."""
    prefix_hit_limit: float = 1.0
    """Share of prompt tokens found in the prefix cache above which a level is no measurement; no part of a hash."""

    @property
    def estimate_s(self) -> float:
        """Seconds the whole session is expected to take (a rough figure: only the order of the queue hangs on it)."""
        return self.start_estimate_s + self.searched_estimate_s + sum(point.estimate_s for point in self.points)


def content_id(content: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of `content` as canonical JSON."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]


def canonical_json(content: Any) -> str:
    """Return `content` (dataclasses, enums, dicts, lists, scalars) as JSON with sorted keys and no spaces."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=asdict)
