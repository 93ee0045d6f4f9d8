"""How large a committed KV pool is: sequences enough that memory follows the length truly, few enough to fit. Pure."""

from __future__ import annotations

import itertools

from contract import kv
from contract.layers import text_config
from contract.specs import ModelSpec, ServerSpec
from orchestrator.fleet import Fleet
from orchestrator.schema import ConfigError, NearFullContext

MIB = 2**20
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
    block_size = server.extra_args.get("block_size")
    try:
        return kv.kv_layout(
            model.config,
            block_size=None if block_size is None else int(block_size),
            device="cpu" if fleet.device == "cpu" else "cuda",
            tensor_parallel_size=server.tensor_parallel_size,
            dtype=server.dtype,
            kv_cache_dtype=server.kv_cache_dtype,
            max_num_batched_tokens=server.max_num_batched_tokens,
            max_model_len=server.max_model_len,
            enable_prefix_caching=server.enable_prefix_caching,
            vllm_version=fleet.vllm_version,
        )
    except kv.UnknownKV as error:
        raise ConfigError(
            [f"model {model.name}: its KV cache cannot be computed ({error}); use sweep.modes=[utilization]"]
        ) from None


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
        room = CPU_POOL_SHARE * fleet.ram_bytes
    else:
        layers = sum(group.layers for group in cache.groups)
        tensor = cache.bytes_per_sequence(lengths[0]) / layers
        wanted = max(FEWEST_SEQUENCES, _power_of_two(SEGMENT_MARGIN * _freed_segment_bytes(model, server) / tensor))
        weights = kv.weight_bytes(model.config, server.tensor_parallel_size, server.dtype)
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


def near_full_sequences(part: NearFullContext, on_cpu: bool) -> int:
    """Return the sequences that the near-full ladder's pool holds."""
    if part.sequences != "auto":
        return part.sequences
    return 4 if on_cpu else 16


def levels_past(kv_concurrency: int) -> tuple[int, ...]:
    """Return powers of two from 1 to the first past `kv_concurrency`."""
    levels = [1]
    while levels[-1] <= kv_concurrency:
        levels.append(levels[-1] * 2)
    return tuple(levels)


def _power_of_two(at_least: float) -> int:
    power = 1
    while power < at_least:
        power *= 2
    return power
