"""The KV cache of a live server by two of the three estimates: the engine's own figures, and the model's formula.

Used by `workers.session`; the third estimate, memory, is read from a device. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from contract.kv import KVLayout, UnknownKV, server_layout
from contract.specs import SessionSpec
from workers.engines import vllm_log
from workers.engines.vllm_log import LogFigures
from workers.metrics import ServerMetrics

EXACT = "kv_cache_memory_bytes"
ROUNDING_LIMIT = 0.001
"""A pool known only roundly gives no rate and no prediction where the rounding is more than this share of it."""


@dataclass(frozen=True, slots=True)
class KvFigures:
    """Columns of `PointRow` by the same names."""

    engine_kv_tokens: int | None = None
    engine_max_concurrency: float | None = None
    engine_num_blocks: int | None = None
    engine_block_size: int | None = None
    engine_kv_bytes: int | None = None
    engine_kv_bytes_source: str | None = None
    engine_bytes_per_token: float | None = None
    formula_bytes_per_token: float | None = None
    formula_bytes_per_sequence: int | None = None
    formula_max_concurrency: float | None = None


def layout_of(
    spec: SessionSpec, max_num_batched_tokens: int | None = None, vllm_version: str | None = None
) -> KVLayout | None:
    """Return the KV layout that the model's config predicts for this server; None for a model we cannot read.

    `max_num_batched_tokens` (tokens) is what the engine chose where the spec leaves it to vLLM.
    """
    try:
        return server_layout(
            spec.model.config,
            spec.server,
            "cpu" if spec.device == "cpu" else "cuda",
            max_num_batched_tokens=max_num_batched_tokens,
            vllm_version=vllm_version,
        )
    except UnknownKV:
        return None


def of_server(spec: SessionSpec, scrape: ServerMetrics, log: LogFigures, vllm_version: str | None) -> KvFigures:
    """Return the figures of one live server. Bytes are those of one GPU's pool; rates are over all ranks.

    The engine's bytes per token are pool / (blocks * block size) where all layers share one kind of cache. Elsewhere a
    block does not hold every layer's tokens, and they are pool / KV tokens, a figure that moves with the length.
    """
    length, ranks = spec.server.max_model_len, spec.gpus or 1
    kv_bytes, source = _pool(spec, scrape, log)
    tokens = _first_int(scrape.cache_figure("kv_cache_size_tokens"), log.kv_tokens)
    concurrency = _first(scrape.cache_figure("kv_cache_max_concurrency"), log.max_concurrency)
    if concurrency is None and tokens is not None:
        concurrency = tokens / length
    layout = layout_of(spec, log.max_num_batched_tokens, vllm_version)
    blocks, block_size = (
        _first_int(scrape.cache_figure("num_gpu_blocks")),
        _first_int(scrape.cache_figure("block_size")),
    )
    one_kind = layout is not None and len(layout.groups) == 1
    pool_tokens = blocks * block_size if one_kind and blocks and block_size else tokens
    precise = kv_bytes is not None and (source == EXACT or ROUNDING_LIMIT * kv_bytes > vllm_log.ROUNDING_BYTES)
    return KvFigures(
        engine_kv_tokens=tokens,
        engine_max_concurrency=concurrency,
        engine_num_blocks=blocks,
        engine_block_size=block_size,
        engine_kv_bytes=kv_bytes,
        engine_kv_bytes_source=source,
        engine_bytes_per_token=ranks * kv_bytes / pool_tokens if precise and kv_bytes and pool_tokens else None,
        formula_bytes_per_token=ranks * layout.marginal_bytes_per_token(length) if layout else None,
        formula_bytes_per_sequence=ranks * layout.bytes_per_sequence(length) if layout else None,
        formula_max_concurrency=layout.max_concurrency(kv_bytes, length) if layout and kv_bytes and precise else None,
    )


def _pool(spec: SessionSpec, scrape: ServerMetrics, log: LogFigures) -> tuple[int | None, str | None]:
    """The pool's bytes: exact where they were given (a label of the metrics), else as the log rounds them."""
    given = _first_int(scrape.cache_figure("kv_cache_memory_bytes"), spec.server.kv_cache_memory_bytes)
    if given is not None:
        return given, EXACT
    if log.available_kv_bytes is not None:
        return log.available_kv_bytes, "the start-up log, to 0.01 GiB"
    return None, None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _first_int(*values: float | None) -> int | None:
    value = _first(*values)
    return None if value is None else int(value)
