"""Makes run directories for the tests of analysis: rows with known numbers, written the way the driver writes them.

Every load row's statistics are computed from its own requests, so that they can be recomputed from requests.parquet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.rows.tables import NESTED, POINTS_SCHEMA, RunPoint, Tables
from contract.kv import KVLayout, kv_layout
from contract.rows import (
    SCHEMA_VERSION,
    MemoryAccount,
    PointRow,
    RequestRow,
    ServerSample,
    SessionRow,
    TelemetryRow,
    to_table,
)
from tests.model_files import published

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Shape:
    """What the synthetic servers are: defaults are like Phi-3-mini on one H100."""

    model: str = "phi-3-mini-4k"
    device: str = "cuda"
    device_name: str | None = "NVIDIA H100 80GB HBM3"
    device_memory_bytes: int = 85_520_809_984
    engine: str = "vllm"
    simulated: bool = False
    gpus: int = 1
    bytes_per_token: int = 393_216
    block: int = 16
    sequences: int = 32
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    extra_ready_bytes: dict[int, int] = field(default_factory=dict)
    weights_bytes: int = 9_100 * MIB
    pool_bytes: int = round(63.32 * GIB)
    utilization: float = 0.9
    levels: tuple[int, ...] = (1, 4, 8, 16)
    sweep_levels: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    repeats: int = 3
    saturation: float = 12.0
    """Concurrency at which the synthetic server's throughput is half of its limit."""
    limit_tok_s: float = 9_000.0
    gpu_util_pct: float = 93.0
    """NVML's, at concurrency 1: as on a real H100 it hardly depends on the level."""
    ladder: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    config: dict[str, Any] | None = field(default=None, hash=False)
    """config.json of a model whose layers differ: pools and figures are then those of its layout, not of one rate."""
    batched: dict[str, int] = field(default_factory=lambda: {"committed": 2048, "utilization": 2048}, hash=False)
    """max_num_batched_tokens of the memory points, by mode."""

    def layout(self, batched: int | None = None) -> KVLayout | None:
        """Return the model's KV layout; None for a model of one rate."""
        if self.config is None:
            return None
        return kv_layout(
            self.config,
            device="cpu" if self.device == "cpu" else "cuda",
            tensor_parallel_size=max(self.gpus, 1),
            max_num_batched_tokens=batched,
            vllm_version=None if self.simulated else "0.25.1",
        )


GPU = Shape()


def family(name: str, base: Shape, **changes: Any) -> Shape:
    """Return a shape like `base` whose model's layers are those of one of our model files."""
    return replace(base, model=name, config=published(name), **changes)


CPU = Shape(
    model="tiny",
    device="cpu",
    device_name="AMD EPYC",
    device_memory_bytes=64 * GIB,
    gpus=0,
    bytes_per_token=4_096,
    block=128,
    sequences=64,
    weights_bytes=700 * MIB,
    pool_bytes=3 * GIB,
    utilization=0.1,
    saturation=2.0,
    limit_tok_s=400.0,
)


def rows(shape: Shape = GPU) -> list[PointRow]:
    """Return the rows of a capacity sweep: both memory modes, comparison, batching, concurrency, near-full ladder."""
    memory = [committed_row(shape, length) for length in shape.lengths]
    memory += [utilization_row(shape, length) for length in shape.lengths]
    comparison = [load_row(shape, "comparison", c, r, 32) for c in (1, 8) for r in range(shape.repeats)]
    batching = [load_row(shape, "batching", c, r) for c in shape.levels for r in range(shape.repeats)]
    sweep = [load_row(shape, "concurrency", c, 0) for c in shape.sweep_levels]
    return [*memory, *comparison, *batching, *sweep, *(ladder_row(shape, c) for c in shape.ladder)]


def short_cpu_rows() -> list[PointRow]:
    """Return the rows of a small run of the CPU backend: two lengths, one utilization, two levels, one repeat.

    Where the pool is cut from resident memory, vLLM gives its tokens but neither its exact size nor a rate.
    """
    shape = replace(CPU, lengths=(512, 1024))
    unknown = {"engine_bytes_per_token": None, "formula_max_concurrency": None}
    loads = [
        replace(
            load_row(shape, "concurrency", level, 0),
            max_model_len=512,
            formula_bytes_per_sequence=512 * shape.bytes_per_token,
            client_wait_share=waited,
            **unknown,
        )
        for level, waited in ((1, 0.01), (4, 0.08))
    ]
    made = [committed_row(shape, 512), committed_row(shape, 1024), replace(utilization_row(shape, 512), **unknown)]
    return [replace(row, vllm_version="0.32.0") for row in (*made, *loads)]


def base_row(shape: Shape, purpose: str, name: str, session: str, **columns: object) -> PointRow:
    """Return a measured row with its identity and its server's configuration filled in."""
    row = PointRow(
        schema_version=SCHEMA_VERSION,
        run_id="run",
        session_id=session,
        point_id=name,
        sweep="capacity",
        kind="memory" if purpose == "kv_scaling" else "load",
        purpose=purpose,
        attempt=1,
        status="measured",
        simulated=shape.simulated,
        started_at="2026-01-02T03:04:05Z",
        model=shape.model,
        dummy_weights=True,
        engine=shape.engine,
        device=shape.device,
        device_name=shape.device_name,
        device_memory_bytes=shape.device_memory_bytes,
        device_ids=["host"] if shape.device == "cpu" else [f"GPU-{i}" for i in range(shape.gpus)],
        gpus=shape.gpus,
        tensor_parallel_size=max(shape.gpus, 1),
        vllm_version=None if shape.simulated else "0.25.1",
        mem_baseline_bytes=4 * MIB,
        telemetry_hz=None if shape.simulated or shape.device == "cpu" else 9.4,
        sampling_cpu_share=None if shape.simulated or shape.device == "cpu" else 0.021,
    )
    return replace(row, **columns)


def committed_row(shape: Shape, length: int) -> PointRow:
    """Return a memory row whose pool holds `sequences` full-length sequences and a null block."""
    batched = shape.batched["committed"]
    pool, blocks = pool_of(shape, shape.sequences, length, batched)
    ready = shape.weights_bytes + pool + shape.extra_ready_bytes.get(length, 0)
    return base_row(
        shape,
        "kv_scaling",
        f"committed-{length}",
        f"session-c{length}",
        mode="committed",
        max_model_len=length,
        sequences=shape.sequences,
        max_num_batched_tokens=batched,
        enforce_eager=True,
        kv_cache_memory_bytes=pool // max(shape.gpus, 1),
        mem_ready_bytes=ready,
        mem_loaded_bytes=ready + 2 * MIB,
        mem_peak_bytes=ready + 3 * MIB,
        warmup_reached_batch=True,
        **kv_columns(shape, length, pool, blocks, batched),
    )


def pool_of(shape: Shape, sequences: int, length: int, batched: int | None) -> tuple[int, int]:
    """Return bytes and blocks of a pool for so many sequences of a length, and a null block."""
    layout = shape.layout(batched)
    if layout is not None:
        pool = max(shape.gpus, 1) * layout.pool_bytes(sequences, length)
        return pool, layout.num_blocks(layout.pool_bytes(sequences, length))
    blocks = sequences * length // shape.block + 1
    return blocks * shape.block * shape.bytes_per_token, blocks


def utilization_row(shape: Shape, length: int) -> PointRow:
    """Return a memory row at a fixed utilization: memory is flat, capacity falls with the length."""
    blocks = shape.pool_bytes // (shape.block * shape.bytes_per_token)
    batched = shape.batched["utilization"]
    ready = shape.weights_bytes + shape.pool_bytes + (2 * MIB if length > 1024 else 0)
    return base_row(
        shape,
        "kv_scaling",
        f"utilization-{length}",
        f"session-u{length}",
        mode="utilization",
        max_model_len=length,
        gpu_memory_utilization=shape.utilization,
        max_num_batched_tokens=batched,
        mem_ready_bytes=ready,
        mem_loaded_bytes=ready + 300 * MIB,
        warmup_reached_batch=True,
        **kv_columns(shape, length, shape.pool_bytes, blocks, batched),
    )


def kv_columns(shape: Shape, length: int, pool: int, blocks: int, batched: int | None = None) -> dict[str, object]:
    """Return the engine's and the formula's columns of a pool."""
    ranks = max(shape.gpus, 1)
    layout = shape.layout(batched)
    if layout is not None:
        own = pool // ranks
        tokens = layout.kv_tokens(own, length)
        one_kind = layout.num_blocks(own) * layout.block_size if len(layout.groups) == 1 else 0
        return {
            "engine_kv_tokens": tokens,
            "engine_max_concurrency": layout.max_concurrency(own, length),
            "engine_num_blocks": layout.num_blocks(own),
            "engine_block_size": layout.block_size,
            "engine_kv_bytes": own,
            "engine_bytes_per_token": pool / (one_kind or tokens),
            "formula_bytes_per_token": ranks * layout.marginal_bytes_per_token(length),
            "formula_bytes_per_sequence": ranks * layout.bytes_per_sequence(length),
            "formula_max_concurrency": layout.max_concurrency(own, length),
        }
    tokens = (blocks - 1) * shape.block
    per_sequence = math.ceil(length / shape.block) * shape.block * shape.bytes_per_token
    return {
        "engine_kv_tokens": tokens,
        "engine_max_concurrency": tokens / length,
        "engine_num_blocks": blocks,
        "engine_block_size": shape.block,
        "engine_kv_bytes": pool // ranks,
        "engine_bytes_per_token": pool / (blocks * shape.block),
        "formula_bytes_per_token": float(shape.bytes_per_token),
        "formula_bytes_per_sequence": per_sequence,
        "formula_max_concurrency": pool / per_sequence,
    }


def load_row(shape: Shape, purpose: str, concurrency: int, repeat: int, requests: int | None = None) -> PointRow:
    """Return a load level at 12 + 64 tokens on a server at fixed utilization."""
    row = base_row(
        shape,
        purpose,
        f"{purpose}-c{concurrency}-r{repeat}",
        "session-load",
        mode="utilization",
        max_model_len=4096,
        gpu_memory_utilization=shape.utilization,
        concurrency=concurrency,
        repeat=repeat,
        prompt_tokens=12,
        output_tokens=64,
        **kv_columns(shape, 4096, shape.pool_bytes, shape.pool_bytes // (shape.block * shape.bytes_per_token)),
    )
    return loaded(shape, row, concurrency, requests or max(32, 10 * concurrency), jitter=1 + 0.01 * repeat)


def ladder_row(shape: Shape, concurrency: int) -> PointRow:
    """Return a near-full-context level on a server whose pool holds 16 sequences."""
    pool, blocks = pool_of(shape, 16, 4096, None)
    row = base_row(
        shape,
        "near_full_context",
        f"near-full-c{concurrency}",
        "session-ladder",
        mode="committed",
        max_model_len=4096,
        sequences=16,
        kv_cache_memory_bytes=pool // max(shape.gpus, 1),
        concurrency=concurrency,
        repeat=0,
        prompt_tokens=4000,
        output_tokens=64,
        **kv_columns(shape, 4096, pool, blocks),
    )
    row = loaded(shape, row, concurrency, 2 * concurrency + 4, jitter=20)
    over = max(concurrency - 16, 0)
    return replace(
        row,
        running_max=min(concurrency, 16),
        waiting_max=over,
        preemptions=over // 4,
        kv_usage_max=min(concurrency / 16.25, 0.998),
    )


def envelope_row(shape: Shape, length: int, concurrency: int, **columns: object) -> PointRow:
    """Return a cell of an envelope whose pool holds eight sequences of 1,024 tokens; half of a context is answer."""
    pool, blocks = pool_of(shape, 8, 1024, 2048)
    row = replace(
        ladder_row(shape, concurrency),
        purpose="envelope",
        point_id=f"envelope-{length}-{concurrency}",
        session_id="session-envelope",
        max_model_len=1024,
        max_num_batched_tokens=2048,
        sequences=8,
        prompt_tokens=length // 2,
        output_tokens=length // 2,
        running_max=min(concurrency, 8 * 1024 // length),
        waiting_max=0,
        preemptions=0,
        **kv_columns(shape, 1024, pool, blocks, 2048),
    )
    return replace(row, **columns)


def loaded(shape: Shape, row: PointRow, concurrency: int, requests: int, jitter: float) -> PointRow:
    """Fill a load row: throughput saturates, and each request takes what Little's law then leaves."""
    output = row.output_tokens or 64
    tok_s = shape.limit_tok_s * concurrency / (concurrency + shape.saturation) / jitter
    mean = concurrency * output / tok_s
    made = [_request(i, mean, concurrency, row.prompt_tokens or 12, output) for i in range(requests)]
    done = [r for r in made if r.ok]
    e2e = [r.e2e_s for r in done if r.e2e_s is not None]
    ttft = [r.ttft_s for r in done if r.ttft_s is not None]
    tpot = [r.tpot_s for r in done if r.tpot_s is not None]
    duration = max(r.sent_s + (r.e2e_s or 0) for r in made)
    completion = sum(r.completion_tokens or 0 for r in done)
    prompt = sum(r.prompt_tokens or 0 for r in done)
    simulated_or_gpu = shape.device != "cpu"
    cards = max(shape.gpus, 1)
    power_w = cards * (380.0 + 3 * concurrency)
    return replace(
        row,
        num_requests=requests,
        completed=len(done),
        failed=len(made) - len(done),
        duration_s=duration,
        mean_e2e_s=float(np.mean(e2e)),
        p50_e2e_s=float(np.percentile(e2e, 50)),
        p95_e2e_s=float(np.percentile(e2e, 95)),
        p99_e2e_s=float(np.percentile(e2e, 99)),
        mean_ttft_s=float(np.mean(ttft)),
        p50_ttft_s=float(np.percentile(ttft, 50)),
        p95_ttft_s=float(np.percentile(ttft, 95)),
        mean_tpot_s=float(np.mean(tpot)),
        p50_tpot_s=float(np.percentile(tpot, 50)),
        p95_tpot_s=float(np.percentile(tpot, 95)),
        qps=len(done) / duration,
        tok_s=completion / duration,
        total_tok_s=(completion + prompt) / duration,
        achieved_concurrency=sum(e2e) / duration,
        p99_icl_s=1.4 * float(np.mean(tpot)),
        tokens_per_chunk=1 + concurrency / 100,
        steady_from_s=0.1,
        steady_settled_s=0.2,
        steady_to_s=0.9 * duration,
        steady_completed=len(done) - 1,
        steady_tok_s=1.03 * completion / duration,
        steady_mean_e2e_s=0.99 * float(np.mean(e2e)),
        steady_p95_e2e_s=0.98 * float(np.percentile(e2e, 95)),
        steady_p95_ttft_s=0.97 * float(np.percentile(ttft, 95)),
        steady_p95_tpot_s=0.96 * float(np.percentile(tpot, 95)),
        gpu_util_pct=min(shape.gpu_util_pct + concurrency / 8, 99.0) if simulated_or_gpu else None,
        power_w=power_w if simulated_or_gpu else None,
        power_limit_w=700.0 * cards if simulated_or_gpu else None,
        energy_j=1.01 * power_w * duration if simulated_or_gpu else None,
        telemetry_hz=9.9 - concurrency / 100 if simulated_or_gpu else None,
        sampling_cpu_share=0.012 + concurrency / 10_000 if simulated_or_gpu else None,
        cpu_util_pct=40.0,
        prefix_hit_ratio=0.0,
        mean_prompt_tokens=prompt / len(done),
        warmup_stable=True,
        client_lag_s=0.001,
        server_hz=2.4,
        server_queue_mean_s=0.001 * concurrency,
        server_queue_p95_le_s=0.3 if concurrency < 8 else math.inf,
        server_prefill_mean_s=0.9 * float(np.mean(ttft)),
        server_prefill_p95_le_s=0.3,
        server_decode_mean_s=0.9 * float(np.mean(e2e)),
        server_decode_p95_le_s=30.0,
        server_ttft_mean_s=0.95 * float(np.mean(ttft)),
        server_ttft_p95_le_s=0.5,
        server_steps=completion // concurrency,
        server_step_mean_tokens=1.1 * concurrency,
        server_generation_tokens=completion,
        token_count_difference=0,
        preemptions=0,
        kv_usage_max=0.01,
        running_max=concurrency,
        waiting_max=0,
        requests=made,
        telemetry=[
            TelemetryRow(0.0, "GPU-0", 70 * GIB, 50.0, 300.0),
            TelemetryRow(0.2, "GPU-0", 70 * GIB, 60.0, 310.0),
        ],
        server_samples=[ServerSample(0.3, concurrency, 0, 0, 0, 0.01, 0, completion // 2)],
    )


def _request(ordinal: int, mean_s: float, concurrency: int, prompt: int, output: int) -> RequestRow:
    e2e = mean_s * (1 + 0.1 * math.sin(ordinal * 1.7))
    ttft = e2e * 0.1
    return RequestRow(
        ordinal=ordinal,
        sent_s=(ordinal // concurrency) * mean_s,
        ok=True,
        ttft_s=ttft,
        e2e_s=e2e,
        tpot_s=(e2e - ttft) / (output - 1),
        prompt_tokens=prompt,
        completion_tokens=output,
        chunks=output,
        finish_reason="length",
        http_status=200,
    )


def failed(row: PointRow, failure_class: str, message: str = "", status: str = "failed") -> PointRow:
    """Return the row as the driver would write it had the point failed: configuration kept, numbers gone."""
    measured = [name for name in row.__slots__ if name.startswith(("mem_", "engine_", "mean_", "p50_", "p95_", "p99_"))]
    measured += ["qps", "tok_s", "total_tok_s", "duration_s", "completed", "failed", "gpu_util_pct", "kv_usage_max"]
    measured += ["engine_kv_tokens", "formula_max_concurrency", "running_max", "waiting_max", "preemptions"]
    measured += ["power_w", "energy_j", "telemetry_hz", "sampling_cpu_share"]
    measured = [name for name in measured if name != "engine"]
    gone = dict.fromkeys(measured)
    return replace(
        row,
        status=status,
        failure_class=failure_class,
        failure_message=message,
        log_tail="…",
        device_name=None,
        vllm_version=None,
        requests=[],
        telemetry=[],
        server_samples=[],
        **gone,
    )


def session_of(row: PointRow, ended_at: str | None = None) -> SessionRow:
    """Return the session a row belongs to; without an end it stands in no timeline."""
    return SessionRow(
        schema_version=SCHEMA_VERSION,
        run_id=row.run_id,
        session_id=row.session_id,
        attempt=row.attempt,
        status="measured",
        simulated=row.simulated,
        started_at=row.started_at,
        ended_at=ended_at,
        node="node-a",
        device_ids=row.device_ids,
        ready_s=42.0,
        stop_s=0.2,
        memory_back_s=0.5,
        mem_baseline_bytes=row.mem_baseline_bytes,
        mem_after_stop_bytes=4 * MIB,
        account=account_of(row),
        compiled=None if row.enforce_eager or row.simulated else False,
        library_bytes=LIBRARY_BYTES if row.device != "cpu" else None,
        graph_capture_bytes=None if row.enforce_eager or row.device == "cpu" else round(0.66 * GIB),
    )


LIBRARY_BYTES = 158 * MIB
"""Of a card, as a probe tells it."""


def account_of(row: PointRow) -> list[MemoryAccount]:
    """Return the account of a memory row's server, whose cards hold what `parts` and `outside` say.

    The cache is what these leave of the memory, but one MiB that nobody has told of. A later load raises the peak by
    `LATER_BYTES`, of several cards the first holds `APART_BYTES` more than the last.
    """
    if row.kind != "memory" or row.device == "cpu" or row.mem_ready_bytes is None or row.mem_loaded_bytes is None:
        return []
    parts = {"weights_bytes": 7_289 * MIB, "buffer_bytes": 41 * MIB}
    parts |= {"graph_pool_bytes": 0 if row.enforce_eager else 336 * MIB}
    beyond = (230 if row.enforce_eager else 518) * MIB
    outside = {"outside_bytes": 527 * MIB + beyond, "context_bytes": 527 * MIB}
    outside |= {"outside_at_init_bytes": 530 * MIB, "outside_now_bytes": 528 * MIB + beyond}
    kv, told = row.engine_kv_bytes or 0, sum(parts.values()) + outside["outside_bytes"] + MIB
    cards, made = len(row.device_ids), []
    memory = {"ready": row.mem_ready_bytes, "loaded": row.mem_loaded_bytes, "peak": row.mem_loaded_bytes + LATER_BYTES}
    for moment, held in memory.items():
        for place, device in enumerate(row.device_ids):
            used = (held - (row.mem_baseline_bytes or 0)) // cards
            used += APART_BYTES // 2 * ((place == 0) - (place == cards - 1))
            cached = used - kv - told
            made.append(MemoryAccount(moment, device, used, kv_bytes=kv, cached_bytes=cached, **parts, **outside))
    return made


LATER_BYTES = 6 * MIB
APART_BYTES = 8 * MIB


NOT_READ_INSIDE = {"outside_at_init_bytes": None, "outside_now_bytes": None}
"""Columns of an account as they are where the workers did not read what is outside torch (before version 7)."""


def write_run(run_dir: Path, points: Iterable[PointRow], left_behind: dict[str, int] | None = None) -> Path:
    """Write shards as the driver does; return the run directory.

    `left_behind`: by session, the bytes above its baseline that did not come back when it was stopped.
    """
    for row in points:
        folder = run_dir / "shards" / row.session_id
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(to_table([row], PointRow), folder / f"{row.point_id}.parquet")
        session = session_of(row)
        if left := (left_behind or {}).get(row.session_id):
            after = {"mem_after_stop_bytes": (row.mem_baseline_bytes or 0) + left, "mem_left_to_others_bytes": 0}
            session = replace(session, memory_back_s=None, left_processes=[], **after)
        pq.write_table(to_table([session], SessionRow), folder / "session.parquet")
    return run_dir


def planned(points: Iterable[PointRow], config: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return what the manifest says of the sessions of these points, as far as analysis reads it."""
    ids = dict.fromkeys(point.session_id for point in points)
    return [{"id": session_id, "model": {"config": config}} for session_id in ids] if config else []


def write_tables(run_dir: Path, points: Iterable[PointRow]) -> Path:
    """Write points.parquet and sessions.parquet alone, as of a run that was sent without its shards."""
    run_dir.mkdir(parents=True, exist_ok=True)
    listed = list(points)
    made = [{name: getattr(row, name, None) for name in POINTS_SCHEMA.names} for row in listed]
    pq.write_table(pa.Table.from_pylist(made, schema=POINTS_SCHEMA), run_dir / "points.parquet")
    sessions = {row.session_id: session_of(row) for row in listed}
    pq.write_table(to_table(list(sessions.values()), SessionRow), run_dir / "sessions.parquet")
    return run_dir


def tables_of(points: Iterable[PointRow], config: dict[str, Any] | None = None) -> Tables:
    """Return the tables of these points without a disk between; `config` is their model's."""
    names = [name for name in PointRow.__slots__ if name not in NESTED]
    listed = list(points)
    sessions = {point.session_id: session_of(point) for point in listed}
    made = (RunPoint(**{name: getattr(point, name) for name in names}) for point in listed)
    return Tables(tuple(made), tuple(sessions.values()), dict.fromkeys(sessions, config) if config else {})


def changed(points: Iterable[PointRow], where: Callable[[PointRow], bool], **columns: object) -> list[PointRow]:
    """Return the points, with columns replaced in those that `where` picks."""
    return [replace(point, **columns) if where(point) else point for point in points]


def assert_every_table_row_says_simulated(page: str) -> None:
    """Hold every body row of every Markdown table of a page to the word."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    heads = {index - 1 for index, line in enumerate(lines) if line.startswith("| ---")}
    body = [line for index, line in enumerate(lines) if index not in heads and not line.startswith("| ---")]
    assert body
    assert [line for line in body if "simulated" not in line] == []
