"""The rows that come back: one `PointRow` a point with its requests and telemetry nested, one `SessionRow` a session.

Workers fill them, the driver writes them, `analysis` reads them. The Parquet schema is derived from these classes, so
there is one definition of every column. Units are in the names; times inside a row are seconds since the row's own
`started_at`, on a monotonic clock.
"""

from __future__ import annotations

import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 13
MEMORY_LEFT_BYTES = 16 * 2**20
"""Memory that did not come back after a stop is a fault from this much above the baseline on; less is what readings
differ by, which is said but not warned of."""

MEASURED = "measured"
FAILED = "failed"
CLIENT_LIMITED = "client_limited"
"""A load level with all its numbers that is no measurement of the server: its client was the limit."""
CAME_TO_NOTHING = "forked, it came to nothing: "
"""How the `start_reason` of a cold server begins that a fork was tried for."""
MUTE_PARENT = "the warm parent did not answer: "
"""The same of one whose warm parent said nothing for as long as it is waited for."""
STEADY_SHARE = 0.95
"""Of a closed-loop level: what has to be in flight in its steady part."""
KEEPS_UP = 0.9
"""A server keeps up with an open loop while it ends at least this share of what is sent."""
JUDGED_FROM_S = 0.5
"""A shorter window holds too few timers and sends to tell a busy load client from one hiccup: it is not judged."""
PRUNED = "pruned"
"""Not measured, because what is known decides it: `failure_message` says what."""
OVER_BUDGET = "over_budget"
"""Left out, because the run's budget had no room for it: `failure_message` says which. Resume measures it."""
RESULT_STATUSES = (MEASURED, "kv_too_small", PRUNED)
"""Statuses that count as done: a measurement, a failure that is itself the answer, or what needs no measurement."""


@dataclass(slots=True)
class Failure:
    """Why something was not measured: a class from `contract.failures`, words, and the end of the server's log."""

    failure_class: str
    message: str
    log_tail: str = ""


@dataclass(slots=True)
class RequestRow:
    """One request as the client saw it. Percentiles are taken over rows whose `ok` is true."""

    ordinal: int
    """Unique on its server: no two requests, warm-up included, ever share a prompt."""
    sent_s: float
    ok: bool
    ttft_s: float | None = None
    """Send to the first chunk that carries a choice."""
    e2e_s: float | None = None
    """Send to the last chunk that carries a choice (the usage chunk excluded)."""
    tpot_s: float | None = None
    """(e2e_s - ttft_s) / (completion_tokens - 1); None for one token."""
    first_byte_s: float | None = None
    """Send to the first byte of the answer's head."""
    last_byte_s: float | None = None
    """Send to the last read of the answer's body."""
    gaps_us: list[int] = field(default_factory=list)
    """Between neighbouring chunks, in whole microseconds: inter-chunk latency, for a chunk may hold several tokens."""
    body_bytes: int = 0
    due_s: float | None = None
    """Of an open loop: when it should have been sent. What lies between, queueing in the client and connecting, is in
    no latency."""
    connect_s: float | None = None
    """Of an open loop: how long it waited for its connection before the send, less what the client's event loop stood
    meanwhile; next to nothing on one that was there. None where it got none: such a request was never in flight, and
    its `sent_s` is when it was taken up. None, too, in a closed loop and in rows before schema version 9."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    chunks: int = 0
    finish_reason: str | None = None
    http_status: int | None = None
    failure_class: str | None = None
    failure_message: str | None = None


@dataclass(slots=True)
class InFlight:
    """Requests that a load process had in flight at one moment."""

    t_s: float
    """Since the level's first window opened, as a request's `sent_s`."""
    requests: int


@dataclass(slots=True)
class ClientRow:
    """One load process during a level: what says whether the client, and not the server, was the limit."""

    streams: int
    """Requests that it kept in flight; of an open loop, the connections it had."""
    cpu_share: float
    """Of one core, in the window."""
    wait_share: float | None = None
    """Share of the window in which it was ready to run and had no core; None where Linux does not say."""
    lag_p99_s: float | None = None
    """How late its event loop woke up a timer, over timers 10 ms apart: by so much stamps can be late."""
    lag_max_s: float | None = None
    late_share: float | None = None
    """Share of the window in which such a timer was due and had not been woken."""
    slip_p99_s: float | None = None
    """From the end of a stream's answer, or from when a request of an open loop was due, to the send, connecting
    (`connect_s`) left out. Up to schema version 8 it was in it, and a stream's answer that broke off ended with its
    last read."""
    slip_max_s: float | None = None
    gap_p99_raised_s: float | None = None
    """By how much stalls of its event loop raised the p99 of its own gaps between chunks (`workers.load.stalls`). Of
    its successes, as the next three; up to schema version 11 this and the next were of failed requests, too."""
    ttft_p95_raised_s: float | None = None
    """By how much they raised the p95 of its own TTFT."""
    e2e_p95_raised_s: float | None = None
    """By how much they raised the p95 of its own E2EL, then that of TPOT; None in rows before schema version 10."""
    tpot_p95_raised_s: float | None = None
    held_s: float | None = None
    """Requests in flight, integrated over the window by counting them at every timer: by Little's law also the sum of
    their times in flight, which comes from other stamps."""
    in_flight: list[InFlight] = field(default_factory=list)
    """About ten a second: the concurrency it achieved over time."""


@dataclass(slots=True)
class TelemetryRow:
    """One sample of one card (or of the host, for the CPU backend) while a point was measured."""

    t_s: float
    """Since the window's opening."""
    device_id: str
    """Physical UUID of the card; `host` for the CPU backend; `SIM-n` for the simulator."""
    memory_used_bytes: int | None = None
    utilization_pct: float | None = None
    power_w: float | None = None
    sm_clock_mhz: int | None = None
    temperature_c: int | None = None
    energy_j: float | None = None
    """The card's counter since the driver was loaded; it moves about ten times a second."""
    clock_event_reasons: int | None = None
    """NVML's bits for why the clock is what it is (idle, power cap, heat …)."""

    @property
    def holds_a_figure(self) -> bool:
        """Whether anything was read: of a card that is lost nothing is."""
        return any(getattr(self, column.name) is not None for column in fields(self)[2:])


@dataclass(slots=True)
class ServerSample:
    """The server's gauges and counters at one moment of a level; None where it has no such metric."""

    t_s: float
    """When the answer to the scrape was there, seconds since the window's opening."""
    running: int | None = None
    waiting: int | None = None
    waiting_capacity: int | None = None
    """Of those waiting: for room in the batch or in the KV pool."""
    waiting_deferred: int | None = None
    """Of those waiting: put off for another reason (a LoRA budget, a KV transfer)."""
    kv_usage: float | None = None
    """Share of KV blocks in use, 0 to 1."""
    preemptions: int | None = None
    """Since the server's start, like all that follow."""
    generation_tokens: int | None = None
    prefix_queries: int | None = None
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int | None = None
    steps: int | None = None
    """Engine steps that gave any request a token, and their tokens."""
    step_tokens: float | None = None
    queued: int | None = None
    """Requests that ended, and their seconds from arrival in the engine to their first scheduling; then those to the
    first token, and from there to the last."""
    queue_total_s: float | None = None
    prefilled: int | None = None
    prefill_total_s: float | None = None
    decoded: int | None = None
    decode_total_s: float | None = None
    first_tokens: int | None = None
    """Requests that had their first token, and their seconds from arrival in the front end."""
    ttft_total_s: float | None = None


@dataclass(slots=True)
class PointRow:
    """One point. Memory is summed over the session's cards (for the CPU backend: PSS of the server's process tree)."""

    # --- which ---
    schema_version: int
    run_id: str
    session_id: str
    point_id: str
    sweep: str
    kind: str
    purpose: str
    attempt: int
    status: str
    simulated: bool
    started_at: str
    """UTC, ISO 8601."""
    # --- failure ---
    failure_class: str | None = None
    failure_message: str | None = None
    log_tail: str | None = None
    # --- configuration ---
    model: str = ""
    dummy_weights: bool = False
    moe: bool = False
    model_cut: str | None = None
    engine: str = ""
    device: str = ""
    device_name: str | None = None
    device_memory_bytes: int | None = None
    """Of one card (the host's RAM for the CPU backend)."""
    device_ids: list[str] = field(default_factory=list)
    visible_devices: list[str] = field(default_factory=list)
    """What CUDA_VISIBLE_DEVICES held for the server."""
    gpus: int = 0
    mode: str = ""
    max_model_len: int = 0
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    dtype: str = "auto"
    quantization: str | None = None
    extra_args: str = "{}"
    """Further flags of the server, as JSON."""
    sequences: int | None = None
    vllm_version: str | None = None
    start: str | None = None
    """How the server that it was measured on was started: `warm` or `cold`; None where none was."""
    co_running_sessions: list[str] = field(default_factory=list)
    # --- KV cache: the engine's own figures ---
    engine_kv_tokens: int | None = None
    engine_max_concurrency: float | None = None
    """KV concurrency: full-length sequences that fit the pool, as the engine computes it."""
    engine_num_blocks: int | None = None
    engine_block_size: int | None = None
    engine_kv_bytes: int | None = None
    """KV pool of one GPU."""
    engine_kv_bytes_source: str | None = None
    engine_bytes_per_token: float | None = None
    """Over all ranks: pool / (blocks * block size) where all layers are of one kind, else pool / engine_kv_tokens."""
    engine_estimated_max_model_len: int | None = None
    """Where not one sequence fits: the longest length that would, by the engine's own estimate."""
    # --- KV cache: the formula from the model's config ---
    formula_bytes_per_token: float | None = None
    """Marginal cost of one more token of one sequence, over all ranks, at this max_model_len."""
    formula_bytes_per_sequence: int | None = None
    """A sequence of max_model_len tokens, in whole blocks, over all ranks."""
    formula_max_concurrency: float | None = None
    """engine_kv_bytes held against the formula: full-length sequences that fit."""
    # --- memory point ---
    mem_baseline_bytes: int | None = None
    """Before the server was started."""
    mem_ready_bytes: int | None = None
    mem_loaded_bytes: int | None = None
    """After a warm-up load that reaches max_num_batched_tokens, idle again."""
    mem_peak_bytes: int | None = None
    warmup_reached_batch: bool | None = None
    """Whether the engine's iteration histogram shows a step as large as the warm-up aimed at."""
    # --- load point ---
    concurrency: int | None = None
    num_requests: int | None = None
    prompt_tokens: int | None = None
    """Asked for; the mean, rounded, where lengths differ from request to request."""
    output_tokens: int | None = None
    prompt_lengths: str | None = None
    """The distribution that prompts' lengths are drawn from, in words; None where all are of `prompt_tokens`."""
    output_lengths: str | None = None
    api: str | None = None
    """`completions` (token ids) or `chat` (text, whose length in tokens only about matches `prompt_tokens`)."""
    shared_prefix: str | None = None
    """What prompts begin with, in words; None where no two share a beginning."""
    mean_prompt_tokens: float | None = None
    """What successes really had, by `usage`."""
    mean_completion_tokens: float | None = None
    prefix_reset: bool | None = None
    """Whether the server said, before the level, that its prefix cache was emptied; None where it cannot be asked (over
    TCP), and of older rows where it did not say."""
    text_cost_assumed: bool | None = None
    """Of a chat: the server did not say what words and template cost, so a word was taken for a token."""
    repeat: int | None = None
    seed: int | None = None
    completed: int | None = None
    failed: int | None = None
    duration_s: float | None = None
    """From the window's opening to the last byte: ramp and drain are in it, and in an open loop the time until the
    first request is due."""
    mean_e2e_s: float | None = None
    p50_e2e_s: float | None = None
    p95_e2e_s: float | None = None
    p99_e2e_s: float | None = None
    mean_ttft_s: float | None = None
    p50_ttft_s: float | None = None
    p95_ttft_s: float | None = None
    mean_tpot_s: float | None = None
    p50_tpot_s: float | None = None
    p95_tpot_s: float | None = None
    p99_ttft_s: float | None = None
    p50_icl_s: float | None = None
    """Inter-chunk latency over the gaps of all successes; a chunk may hold several tokens (tokens_per_chunk)."""
    p95_icl_s: float | None = None
    p99_icl_s: float | None = None
    tokens_per_chunk: float | None = None
    qps: float | None = None
    tok_s: float | None = None
    """Completion tokens of successes / duration_s."""
    total_tok_s: float | None = None
    """Prompt and completion tokens of successes / duration_s."""
    achieved_concurrency: float | None = None
    """Time-weighted mean of requests in flight over the window."""
    most_in_flight: int | None = None
    stopped_by: str | None = None
    """What ended the level: its `requests`, its `time`, or the `precision` of its metric."""
    warmup_tok_s: list[float] = field(default_factory=list)
    """Throughput of each round of the warm-up: it was over when two neighbours agreed, or after so many."""
    warmup_stable: bool | None = None
    """Whether its last two rounds agreed; None without a warm-up, and for an open loop, whose warm-up is one round."""
    asked_s: float | None = None
    """Of a closed loop that was to be ended by time."""
    arrivals: str | None = None
    """Of an open loop, in words: process and course of the rate; None for a closed loop."""
    request_rate: float | None = None
    """Of an open loop: the level, requests a second; stages are shares of it."""
    offered_qps: float | None = None
    """Of an open loop: requests over the time from the window's opening to the last of them falling due. Of constant
    arrivals, the first of which is due at once, gaps over that time."""
    sent_qps: float | None = None
    """Of an open loop, between the middles of its first and its last quarter: requests that were sent a second."""
    ended_qps: float | None = None
    """The same requests, as they ended (`workers.load.keeping_up`)."""
    keeps_up: bool | None = None
    """Whether that is at least `KEEPS_UP` of what was sent; None with too few requests, or within noise."""
    p99_send_delay_s: float | None = None
    """Of an open loop: from due to sent, connecting left out (up to schema version 8 it was in it). It is in no
    latency."""
    p99_connect_s: float | None = None
    """Of an open loop: what requests waited for their connections. It is in no latency, and not the client's delay."""
    # --- the steady part of a load point: ramp and drain left out ---
    steady_from_s: float | None = None
    """Since the window's opening."""
    steady_settled_s: float | None = None
    """When the opening burst was over, from where on the latencies count (`workers.load.steady`). Up to version 8 None,
    and the burst is in them."""
    steady_to_s: float | None = None
    steady_completed: int | None = None
    """Successes that the latencies are over; None where what was left after the burst was too short for any."""
    steady_tok_s: float | None = None
    """Tokens that arrived inside / its length."""
    steady_mean_e2e_s: float | None = None
    steady_p50_e2e_s: float | None = None
    steady_p95_e2e_s: float | None = None
    steady_p95_ttft_s: float | None = None
    steady_p95_tpot_s: float | None = None
    client_wait_share: float | None = None
    """Largest share of the window in which a load process was ready to run and had no core: its stamps can be late by
    as much."""
    client_lag_s: float | None = None
    """How late the event loop of the worst load process woke up (p99)."""
    gap_p99_raised_s: float | None = None
    """By how much stalls of load processes raised the p99 of this level's gaps between chunks (`p99_icl_s`), of all
    streams together (`workers.load.stalls`); then the same of the next five figures. None in rows before schema
    version 12, of which only what a process did to its own is known (`clients`)."""
    ttft_p95_raised_s: float | None = None
    ttft_p99_raised_s: float | None = None
    e2e_p95_raised_s: float | None = None
    e2e_p99_raised_s: float | None = None
    tpot_p95_raised_s: float | None = None
    gpu_util_pct: float | None = None
    """Mean of NVML's utilisation over the window and the cards; None without GPUs."""
    cpu_util_pct: float | None = None
    """Mean host CPU utilisation over the window (all cores = 100)."""
    power_w: float | None = None
    """Mean, summed over the session's cards; None where one of them tells none."""
    power_limit_w: float | None = None
    """What the cards may draw together."""
    energy_j: float | None = None
    """Of all cards over duration_s, from their energy counters."""
    throttle_reasons: list[str] | None = None
    """Why a card's clock was held down at any sample of the window: power cap, heat, an outside brake. None where no
    card tells (CPU backend, a slice of a card); such rows of older runs have an empty list, too."""
    foreign_processes: list[str] | None = None
    """Processes of others that were seen on the cards in the point's window; of a memory point, which rests on these
    readings, also before the server started, when it was ready, and as the point was read at its end; of a point that
    came to nothing, those that its session had seen. Each once, with the most that it held. None where none is known
    and the server's own were not among those seen (no server, no card, or NVML's pids are not this container's), so
    that nobody can tell. Rows before schema version 11 have those of before the start at every point."""
    mem_tree_bytes: int | None = None
    """Highest memory that NVML attributes to the server's own processes at one look; None where they were not seen."""
    telemetry_hz: float | None = None
    """Samples of a card a second that were really taken in the window, those of a lost card, which hold no figure, left
    out; of several cards the fewest."""
    sampling_cpu_share: float | None = None
    """CPU time of all that watched the window (NVML and its list of processes, the server's metrics, the host's CPU) /
    its length: a share of one core. Up to version 5 `telemetry_cost_share` was wall time of NVML's reads."""
    prefix_hit_ratio: float | None = None
    """Prefix-cache hits / queried tokens in the window, from the server's counters."""
    prefix_shared_ratio: float | None = None
    """Share of the prompt tokens that prompts were meant to have in common: shared prefixes, a chat's template. Hits
    come to no more, for the cache holds whole blocks."""
    preemptions: int | None = None
    kv_usage_max: float | None = None
    """Highest vllm:kv_cache_usage_perc sampled in the window, 0 to 1."""
    running_max: int | None = None
    waiting_max: int | None = None
    waiting_capacity_max: int | None = None
    waiting_deferred_max: int | None = None
    server_hz: float | None = None
    """Samples of its metrics a second that the server answered in the window."""
    server_generation_tokens: int | None = None
    """The server's own count of generated tokens in the window."""
    token_count_difference: int | None = None
    """server_generation_tokens - completion tokens of all requests for which the client knows them. A level without
    failures must have 0; what the server did for requests that failed makes it positive."""
    server_steps: int | None = None
    """Engine steps in the window that gave any request a token."""
    server_step_mean_tokens: float | None = None
    """Mean size of such a step: tokens generated, and prompt tokens of the requests whose prefill it ended."""
    server_queue_mean_s: float | None = None
    """Over the window's requests, by the engine: arrival to first scheduling."""
    server_queue_p95_le_s: float | None = None
    """The histogram bucket's bound that 95 % of the requests do not exceed: the p95 is at most that. Infinite beyond
    the last bucket."""
    server_prefill_mean_s: float | None = None
    """First scheduling to first token."""
    server_prefill_p95_le_s: float | None = None
    server_decode_mean_s: float | None = None
    """First to last token."""
    server_decode_p95_le_s: float | None = None
    server_ttft_mean_s: float | None = None
    """Arrival in the server's front end to first token."""
    server_ttft_p95_le_s: float | None = None
    # --- nested ---
    clients: list[ClientRow] = field(default_factory=list)
    limited_before: list[str] = field(default_factory=list)
    """Why earlier tries at this level, with fewer load processes, were limited by their client."""
    requests: list[RequestRow] = field(default_factory=list)
    telemetry: list[TelemetryRow] = field(default_factory=list)
    server_samples: list[ServerSample] = field(default_factory=list)
    """The server's own metrics in the window of a level, at least twice a second (`server_hz`)."""


@dataclass(slots=True)
class MemoryAccount:
    """One card's memory at one moment of a server's life, in parts that were each measured; bytes.

    `used_bytes` is what the card held for the server. Of it the residual is what neither the allocator nor a probe
    tells. `outside_bytes` and the last two columns are no parts: they are read from the counters that they would
    explain. Parts of torch's allocator are told apart by the address of every block it holds.
    """

    moment: str
    """`ready`: idle, before any request. `loaded`: idle again after the load of the memory point; older runs have none.
    `peak`: the moment at which all cards together held most; the allocator is read after the last point."""
    device_id: str
    used_bytes: int | None = None
    """NVML, less what was there before the server; None for the CPU backend, where only the two next columns exist."""
    weights_bytes: int | None = None
    """The model's parameters and buffers."""
    kv_bytes: int | None = None
    """The KV pool's tensors."""
    graph_pool_bytes: int | None = None
    """The private pools of CUDA graphs."""
    buffer_bytes: int | None = None
    """Other live tensors: the engine's inputs and outputs, workspaces."""
    cached_bytes: int | None = None
    """What activations have left in the allocator's cache."""
    outside_bytes: int | None = None
    """What the card still held at the server's end, when torch had freed all: CUDA context, kernels, libraries, and
    what the driver keeps of CUDA graphs."""
    context_bytes: int | None = None
    """What a bare CUDA context takes: a probe process that makes one, before the server, and does nothing else. None
    where another process came or went meanwhile."""
    outside_now_bytes: int | None = None
    """What of the whole card was in use and not held by the worker's allocator, by cudaMemGetInfo in the worker at this
    moment: processes of others are in it."""
    outside_at_init_bytes: int | None = None
    """The same at the engine's own first look at the card, before it loaded the model; None where it kept none."""


@dataclass(slots=True)
class StartPhase:
    """A part of a server's start, as its log tells: from the end of the part before."""

    name: str
    """One of `workers.engines.vllm_phases.ENDS`, or `listening`, the last."""
    begin_s: float
    """Since the launch."""
    seconds: float
    """To 0.1 s: the log is looked at so often."""


class AfterStop:
    """What a row that has these columns tells of the cards after its server was stopped."""

    __slots__ = ()
    memory_back_s: float | None
    mem_baseline_bytes: int | None
    mem_after_stop_bytes: int | None
    mem_left_to_others_bytes: int | None

    @property
    def memory_left_bytes(self) -> int | None:
        """What was above the baseline when the wait for it ended, whoever held it.

        None where all came back or nobody could read it.
        """
        if self.memory_back_s is not None or self.mem_after_stop_bytes is None:
            return None
        return self.mem_after_stop_bytes - (self.mem_baseline_bytes or 0)

    @property
    def memory_kept_bytes(self) -> int | None:
        """What of `memory_left_bytes` no other process holds; None where all came back or nobody can tell."""
        if self.memory_left_bytes is None or self.mem_left_to_others_bytes is None:
            return None
        return self.memory_left_bytes - self.mem_left_to_others_bytes


@dataclass(slots=True)
class SessionRow(AfterStop):
    """One server's life: where it ran, how long each phase took, and what it left behind."""

    schema_version: int
    run_id: str
    session_id: str
    attempt: int
    status: str
    simulated: bool
    started_at: str
    """UTC, ISO 8601."""
    ended_at: str | None = None
    failure_class: str | None = None
    failure_message: str | None = None
    log_tail: str | None = None
    node: str = ""
    foreign_processes: list[str] | None = None
    """Processes of others that were seen on the cards at any look of this session: before the server, when it was
    ready, in its windows, when all was measured, and where memory stayed in use after it. None where nobody can tell,
    as of a point. Rows before schema version 11 lack those of the windows, and have an empty list for None."""
    niceness: int | None = None
    """Of the server's process; Ray's workers have 15 unless told otherwise."""
    visible_devices: list[str] = field(default_factory=list)
    device_ids: list[str] = field(default_factory=list)
    device_name: str | None = None
    server_pid: int | None = None
    ready_s: float | None = None
    """Launch to a proven answer of this server."""
    start: str | None = None
    """`warm` (forked from a process that had imported vLLM) or `cold`; None where none was started."""
    start_reason: str | None = None
    """Why it is cold where warm was asked for."""
    warm_wait_s: float | None = None
    """Until the warm parent had imported, or refused; not in `ready_s`. None where none was asked."""
    fork_lost_s: float | None = None
    """From the warm parent's offer until the server that it was to fork had been given up for a cold one, and was gone;
    not in `ready_s`. None where nothing was given up, and before schema version 12."""
    fork_threads: list[str] = field(default_factory=list)
    """Names of the threads that the warm parent had beside its first when it was asked to fork, after it had forked
    once for trial: of libraries in C, and known to do no harm."""
    phases: list[StartPhase] = field(default_factory=list)
    """Of its start; empty for an engine whose log does not tell."""
    stop_s: float | None = None
    """Stop request to the last process of the tree gone."""
    memory_back_s: float | None = None
    """Stop request to memory back at its baseline; None when it did not come back in time (`memory_left_bytes`)."""
    mem_baseline_bytes: int | None = None
    mem_after_stop_bytes: int | None = None
    """Each card counted with its baseline at the least: what others gave back hides nothing that the server left."""
    left_processes: list[str] | None = None
    """Processes of others on the cards when memory had not come back in time. None where it had, where nobody can tell
    them from the server's own, and before schema version 11."""
    mem_left_to_others_bytes: int | None = None
    """Of what was above the baseline then: what these held more than others did before the server, by NVML's figure of
    each process. None also where NVML does not tell it."""
    exit_code: int | None = None
    argv: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    """NAME=value of what we set or pinned for the server; secrets masked."""
    vllm_version: str | None = None
    torch_version: str | None = None
    driver_version: str | None = None
    python_version: str | None = None
    load_client: str | None = None
    """What sends its load: the versions of aiohttp and of the event loop. None before schema version 13."""
    requests_sent: int = 0
    graph_capture_bytes: int | None = None
    """Memory of one worker's card that went while the engine captured CUDA graphs (its log, to 0.01 GiB): their pools,
    what the driver took for them, and what the warm-up before each capture loaded or left in the cache. Of several
    workers vLLM has the first alone log it, or each its own; here is the last line's."""
    compiled: bool | None = None
    """Whether the engine compiled its graphs (torch.compile) or loaded all of them from the cache, by its log; None of
    an eager one and of an engine that does not tell. Rows before schema version 10 have none."""
    library_bytes: int | None = None
    """By how much a card rose, beyond a bare context and torch's allocator, when a probe process had torch compute on
    it before the server: torch's own kernels and cuBLAS. Read by a run's first session on a node, of its first card."""
    account: list[MemoryAccount] = field(default_factory=list)
    """One row a moment and card; empty for a server on TCP: only a private socket may have the endpoint it takes."""

    @property
    def fork_came_to_nothing(self) -> bool:
        """Whether a fork was tried and given up for a cold server."""
        return (self.start_reason or "").startswith(CAME_TO_NOTHING)

    @property
    def warm_parent_is_mute(self) -> bool:
        """Whether a fork was asked for, and no answer came in time."""
        return (self.start_reason or "").startswith(MUTE_PARENT)


@dataclass(slots=True)
class SessionEnd:
    """What a session hands over when it has stopped: its row and all that its server wrote."""

    row: SessionRow
    log: str


def arrow_schema(row_class: type) -> pa.Schema:
    """Return the Parquet schema of a row class: its fields in order, all nullable, nested rows as lists of structs."""
    import pyarrow as pa

    hints = typing.get_type_hints(row_class)
    return pa.schema([(column.name, _arrow_type(hints[column.name])) for column in fields(row_class)])


def _arrow_type(hint: Any) -> pa.DataType:
    import pyarrow as pa

    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    if hint in scalars:
        return scalars[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _arrow_type(next(a for a in arguments if a is not type(None)))
    if origin is list:
        return pa.list_(_arrow_type(arguments[0]))
    if is_dataclass(hint):
        return pa.struct(list(arrow_schema(typing.cast(type, hint))))
    raise TypeError(f"no Parquet type for {hint!r}")


def to_table(rows: list[Any], row_class: type) -> pa.Table:
    """Return rows of one class as an Arrow table with that class's schema (also when there are none)."""
    import pyarrow as pa

    return pa.Table.from_pylist([asdict(row) for row in rows], schema=arrow_schema(row_class))
