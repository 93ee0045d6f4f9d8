"""How large a committed KV pool is: sequences enough that memory follows the length truly, few enough to fit. Pure."""

from __future__ import annotations

import bisect
import itertools

from contract import kv
from contract.layers import text_config
from contract.specs import ModelSpec, ServerSpec
from orchestrator.fleet import Fleet
from orchestrator.problems import ConfigError

MIB, GIB = 2**20, 2**30
WEIGHTS_SURE_SHARE = 0.9
"""Of estimated weights: so much of them is there even where the estimate is too high."""
CPU_STEP_BYTES = 128 * MIB
"""A step of the curve on the CPU backend: far above what a process tree's memory wavers by."""
FEWEST_SEQUENCES = 32
GPU_RESERVE_BYTES = 4 * 2**30
"""CUDA context, activations, graphs and fragments beside weights and pool."""
CPU_POOL_SHARE = 0.25
SEGMENT_MARGIN = 1.5
COMMITTED_BATCHED_TOKENS = 2048
"""Tokens of a step in committed servers: small activations keep the slope of memory true."""


def layout(model: ModelSpec, server: ServerSpec, fleet: Fleet) -> kv.KVLayout:
    """Return the KV layout of a server. Raises `ConfigError` for a model whose KV cache we cannot compute."""
    try:
        return kv.server_layout(
            model.config, server, "cpu" if fleet.device == "cpu" else "cuda", vllm_version=fleet.vllm_version
        )
    except kv.UnknownKV as error:
        problem = f"model {model.name}: its KV cache cannot be computed ({error}), so no pool can be sized for it"
        raise ConfigError([problem]) from None


def too_large(model: ModelSpec, server: ServerSpec, fleet: Fleet) -> str | None:
    """Return why a stated pool cannot be held by a card (the host, for the CPU backend), or None where it may be."""
    holder, size = ("host", fleet.ram_bytes) if fleet.device == "cpu" else ("GPU", fleet.gpu_memory_bytes or 0)
    pool = server.kv_cache_memory_bytes
    if pool is None or not size:
        return None
    try:
        weights = _weight_bytes(model, server)
    except kv.UnknownKV:
        weights = 0
    if pool + WEIGHTS_SURE_SHARE * weights <= size:
        return None
    return (
        f"a KV pool of {pool / GIB:.1f} GiB beside about {weights / GIB:.1f} GiB of weights does not fit a {holder} of "
        f"{size / GIB:.1f} GiB: lower server.kv_cache_memory_bytes, or the sequences of the sweep"
    )


def sequences(lengths: tuple[int, ...], server: ServerSpec, model: ModelSpec, fleet: Fleet) -> int:
    """Return how many full-length sequences the committed pools hold, the same for all `lengths` (tokens, ascending).

    `server` is the committed server, its pool not yet sized. On GPUs one layer's KV tensor at the shortest length must
    be larger than the segments which activations free before the pool is allocated: smaller tensors settle in those
    segments, and memory grows by less than the pool does. On CPUs a step of the curve must be large against the noise
    of a process tree. Powers of two, halved while the longest pool does not fit.
    """
    cache = layout(model, server, fleet)
    if fleet.device == "cpu":
        steps = [cache.bytes_per_sequence(b) - cache.bytes_per_sequence(a) for a, b in itertools.pairwise(lengths)]
        smallest = min((step for step in steps if step > 0), default=cache.bytes_per_sequence(lengths[0]))
        wanted = _power_of_two(CPU_STEP_BYTES / smallest)
        room = CPU_POOL_SHARE * fleet.ram_bytes / max(fleet.largest_node, 1)
    else:
        layers = sum(group.layers for group in cache.groups)
        tensor = cache.bytes_per_sequence(lengths[0]) / layers
        wanted = max(FEWEST_SEQUENCES, _power_of_two(SEGMENT_MARGIN * _freed_segment_bytes(model, server) / tensor))
        weights = _weight_bytes(model, server)
        room = (fleet.gpu_memory_bytes or 0) - weights - GPU_RESERVE_BYTES
    while wanted > 1 and cache.pool_bytes(wanted, lengths[-1]) > room:
        wanted //= 2
    return wanted


def _freed_segment_bytes(model: ModelSpec, server: ServerSpec) -> float:
    """The largest tensor of the profiling step: the gate-and-up product of a full batch, or its queries and keys."""
    text = text_config(model.config)
    ranks = server.tensor_parallel_size
    widest = max(2 * int(text.get("intermediate_size") or 0), 3 * int(text["hidden_size"])) / ranks
    return (server.max_num_batched_tokens or COMMITTED_BATCHED_TOKENS) * widest * 2


def expected_pool_bytes(model: ModelSpec, server: ServerSpec, fleet: Fleet) -> int:
    """Return about how large a rank's pool will be where it is not stated; the engine says it once it runs."""
    if server.kv_cache_memory_bytes is not None:
        return server.kv_cache_memory_bytes
    total = fleet.ram_bytes if fleet.device == "cpu" else fleet.gpu_memory_bytes or 0
    weights = _weight_bytes(model, server)
    return max(0, int((server.gpu_memory_utilization or 0) * total) - weights - GPU_RESERVE_BYTES // 2)


def levels_past(border: int) -> tuple[int, ...]:
    """Return powers of two from 1 to the first past `border`."""
    levels = [1]
    while levels[-1] <= border:
        levels.append(levels[-1] * 2)
    return tuple(levels)


def most_at_once(cache: kv.KVLayout, blocks: int, length: int, prompt: int) -> int:
    """Return how many running sequences that grow from `prompt` to `length` tokens so many blocks hold at once."""
    return bisect.bisect_right(range(blocks + 1), blocks, key=lambda n: cache.blocks_at_once(n, length, prompt)) - 1


def levels_around(borders: list[int]) -> tuple[int, ...]:
    """Return powers of two to the first past the highest border, and each border (the last that fits) and the next."""
    near = {level for border in borders for level in (border, border + 1) if level >= 1}
    return tuple(sorted({*near, *levels_past(max(borders))}))


def _power_of_two(at_least: float) -> int:
    power = 1
    while power < at_least:
        power *= 2
    return power


def _weight_bytes(model: ModelSpec, server: ServerSpec) -> int:
    return kv.weight_bytes(model.config, server.tensor_parallel_size, server.dtype, server.quantization)
