"""KV-cache arithmetic: from a model's config.json to bytes per block, per sequence and per pool, as vLLM sizes them.

Called wherever a pool is sized or a measurement is held against the formula; pure (no vLLM, no torch).
It must never be presented as a measurement: the engine's own figures are read from its /metrics.
"""

from __future__ import annotations

from dataclasses import dataclass

from contract.layers import (
    FULL,
    LINEAR_ATTENTION,
    MLA,
    SLIDING_WINDOW,
    Config,
    LayerGroup,
    UnknownKV,
    layer_groups,
    text_config,
)
from contract.specs import ServerSpec
from contract.weights import weight_bytes

__all__ = [
    "FULL",
    "LINEAR_ATTENTION",
    "MLA",
    "SLIDING_WINDOW",
    "KVLayout",
    "LayerGroup",
    "UnknownKV",
    "kv_layout",
    "layer_groups",
    "model_limit",
    "server_layout",
    "weight_bytes",
]

_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")

# RoPE kinds whose max_position_embeddings already is the scaled length (vLLM's config/model.py).
_ALREADY_SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How vLLM lays one rank's KV pool out; made by `kv_layout`.

    The pool is a row of blocks. A block holds one page of `layers_per_block` layers, so the layers are cut into groups
    of that many (short groups are padded), each with a block table of its own, and a sequence draws blocks from the one
    pool for every group. One block, the null block, is never given to a sequence.

    A method's `length` is the length the server is started with (`--max-model-len`), in tokens; None takes the layout's
    `max_model_len`. All bytes are those of one tensor-parallel rank.
    """

    groups: tuple[LayerGroup, ...]
    block_size: int
    """Tokens of one block of an attention layer."""
    page_bytes: int
    """One layer's share of a block, the same for every layer: a state is padded to it."""
    layers_per_block: int
    in_flight_tokens: int
    """Tokens that may be scheduled and not yet settled: a sliding window keeps their blocks besides its own."""
    state_blocks: int
    """Blocks of a linear-attention group that one sequence holds: 1, or 2 with prefix caching."""
    max_model_len: int | None = None

    @property
    def bytes_per_block(self) -> int:
        """Bytes that one block takes of the pool: layers_per_block * page_bytes."""
        return self.layers_per_block * self.page_bytes

    def blocks_per_sequence(self, length: int | None = None) -> int:
        """Return the blocks that vLLM reserves for one sequence of `length` tokens, over all groups.

        For each group of layers (v1/kv_cache_interface.py, `max_memory_usage_bytes`): full attention and MLA
        ceil(L / block); sliding window ceil(min(window - 1 + in flight, L) / block) + 1, as the window need not start
        at a block's start; linear attention `state_blocks`.
        """
        return sum(self.blocks_of(group, length) for group in self.groups)

    def blocks_of(self, group: LayerGroup, length: int | None = None) -> int:
        """Return the blocks of one sequence of `length` tokens that are for the layers of `group`."""
        return self.tables(group) * self._pages(group, self._length(length))

    def grows_until(self, group: LayerGroup) -> int | None:
        """Return the length, in tokens, past which `group` takes no further block; None where it always grows.

        window - 1 + in flight for a sliding window, 0 for linear attention.
        """
        if group.kind == LINEAR_ATTENTION:
            return 0
        return None if group.window is None else group.window - 1 + self.in_flight_tokens

    def blocks_held(self, group: LayerGroup, length: int | None = None) -> int:
        """Return the blocks of `blocks_of` that stay while the sequence only decodes.

        A window's blocks are freed once it has moved past them (v1/core/single_type_kv_cache_manager.py,
        `remove_skipped_blocks`); with tokens in flight it holds more.
        """
        tokens = self._length(length)
        if group.window is None:
            return self.blocks_of(group, tokens)
        within = _ceil(group.window, self.block_size) + 1  # it need not start at a block's start
        return self.tables(group) * min(_ceil(tokens, self.block_size), within)

    def blocks_at_once(self, sequences: int, length: int | None = None, prompt: int | None = None) -> int:
        """Return the most blocks that `sequences` running sequences hold at once, each grown to `length` tokens.

        `blocks_per_sequence` counts tokens in flight for every sequence, but all share them, and only a `prompt` has
        many (None: it is all of `length`).
        """
        tokens = self._length(length)
        each = self.blocks_per_sequence(tokens)
        grown = sequences * self.blocks_grown(tokens)
        return min(sequences * each, grown + self.in_flight_blocks(tokens, prompt))

    def blocks_grown(self, length: int | None = None) -> int:
        """Return the blocks of one sequence of `length` tokens that only decodes (`blocks_held`), over all groups."""
        return sum(self.blocks_held(group, length) for group in self.groups)

    def in_flight_blocks(self, length: int | None = None, prompt: int | None = None) -> int:
        """Return by how many blocks, at most, prompts that are being computed hold more than grown ones.

        vLLM computes prompts in their order, so the tokens in flight are one stretch of prompts, the first begun
        before: at the worst just so far that its window still reaches back to its first block. Of each prompt in the
        stretch, counted from there, and of what is left for the last, all but a window is outside of windows. Each of
        these sequences has yet to grow from `prompt` to `length`.
        """
        tokens = self._length(length)
        first = prompt or tokens
        windowed = [(g, g.window) for g in self.groups if g.window is not None and g.window < first]
        to_grow = self.blocks_grown(tokens) - self.blocks_grown(first)
        most = 1 + max((self._stretch(window) // first for _, window in windowed), default=-1)
        return max(
            sum(self.tables(g) * (self._outside(window, first, n) // self.block_size) for g, window in windowed)
            - n * to_grow
            for n in range(most + 1)
        )

    def bytes_per_sequence(self, length: int | None = None) -> int:
        """Return bytes of one sequence of `length` tokens, in whole blocks."""
        return self.blocks_per_sequence(length) * self.bytes_per_block

    def marginal_bytes_per_token(self, length: int | None = None) -> float:
        """Return the slope of `bytes_per_sequence` over the block that ends at `length`.

        A sliding-window group adds to it while L < window - 1 + in flight, linear attention never.
        """
        tokens = max(self._length(length), 2 * self.block_size)
        blocks = self.blocks_per_sequence(tokens) - self.blocks_per_sequence(tokens - self.block_size)
        return blocks * self.bytes_per_block / self.block_size

    def num_blocks(self, pool_bytes: int) -> int:
        """Return the blocks of a pool, the null block among them (`num_gpu_blocks` on /metrics)."""
        return pool_bytes // self.bytes_per_block

    def pool_bytes(self, sequences: int, length: int | None = None) -> int:
        """Return the pool that holds `sequences` sequences of `length` tokens at once, the null block besides."""
        return self.bytes_per_block * (sequences * self.blocks_per_sequence(length) + 1)

    def max_concurrency(self, pool_bytes: int, length: int | None = None) -> float:
        """Return all blocks / blocks_per_sequence: `kv_cache_max_concurrency` on /metrics."""
        return self.num_blocks(pool_bytes) / self.blocks_per_sequence(length)

    def kv_tokens(self, pool_bytes: int, length: int | None = None) -> int:
        """Return int(max_concurrency * length): `kv_cache_size_tokens` on /metrics."""
        return int(self.max_concurrency(pool_bytes, length) * self._length(length))

    def _stretch(self, window: int) -> int:
        return self.in_flight_tokens + window + self.block_size - 2

    def _outside(self, window: int, prompt: int, prompts: int) -> int:
        """Tokens outside of their windows, of so many prompts in flight."""
        whole, rest = divmod(self._stretch(window), prompt)
        return min(prompts, whole) * (prompt - window) + (max(0, rest - window) if prompts > whole else 0)

    def tables(self, group: LayerGroup) -> int:
        """Return the block tables that the layers of `group` are cut into."""
        return _ceil(group.layers, self.layers_per_block)

    def _pages(self, group: LayerGroup, tokens: int) -> int:
        if group.kind == LINEAR_ATTENTION:
            return self.state_blocks
        until = self.grows_until(group)
        return _ceil(tokens, self.block_size) if until is None else _ceil(min(until, tokens), self.block_size) + 1

    def _length(self, length: int | None) -> int:
        tokens = self.max_model_len if length is None else length
        if tokens is None or tokens < 1:
            raise ValueError("a length of at least one token is needed")
        return tokens


def kv_layout(
    config: Config,
    *,
    block_size: int | None = None,
    device: str = "cuda",
    tensor_parallel_size: int = 1,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    max_num_batched_tokens: int | None = None,
    max_model_len: int | None = None,
    enable_prefix_caching: bool | None = None,
    vllm_version: str | None = None,
) -> KVLayout:
    """Return the layout that vLLM 0.25 to 0.32 would choose.

    Sources: v1/core/kv_cache_utils.py (`_get_kv_cache_groups_uniform_page_size`, `get_max_concurrency_...`),
    platforms/interface.py (`_align_hybrid_block_size`) and platforms/cpu.py, config/vllm.py (`max_in_flight_tokens`).

    Args:
        config: content of config.json.
        block_size: `--block-size`, or what a running engine reports; None takes vLLM's default: 16 on GPUs (more where
            the backend asks for it: MLA and head size 256 on Blackwell), 128 on the CPU build, and 16 there for MLA
            (without AMX). Linear attention may enlarge it, until an attention page is as large as a state.
        device: `cuda` or `cpu`.
        tensor_parallel_size: ranks, >= 1.
        dtype: `--dtype`.
        kv_cache_dtype: `--kv-cache-dtype`.
        max_num_batched_tokens: None takes vLLM's default: 8192 for GPUs of 70 GiB and more, 2048 * ranks on CPUs. It
            matters to sliding windows only.
        max_model_len: length that the layout's methods take when they are given none.
        enable_prefix_caching: matters to linear attention only; None takes vLLM's default: on, off before 0.26.
        vllm_version: e.g. "0.25.1"; None stands for the newest. Before 0.26 one batch counts as in flight, since then
            two where scheduling is asynchronous: on GPUs, unless it is switched off.

    Raises:
        UnknownKV: the model or a type is not covered.

    Example:
        >>> layout = kv_layout({"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4,
        ...                     "num_key_value_heads": 4, "head_dim": 64})
        >>> layout.bytes_per_block, layout.marginal_bytes_per_token(512), layout.pool_bytes(8, 512)
        (65536, 4096.0, 16842752)
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device is 'cuda' or 'cpu', not {device!r}")
    groups = layer_groups(config, tensor_parallel_size, dtype, kv_cache_dtype, device)
    older = vllm_version is not None and _release(vllm_version) < (0, 26)
    block = block_size or _default_block_size(device, groups)
    states = [group.state_bytes for group in groups if group.kind == LINEAR_ATTENTION]
    token_bytes = max(group.bytes_per_token for group in groups)
    if states:
        if not token_bytes:
            raise UnknownKV("a model of linear attention only is not covered")
        smallest = max(block, 32 if device == "cpu" else 16)
        block = max(block, smallest * _ceil(max(states), smallest * token_bytes))
    batched = max_num_batched_tokens or (8192 if device == "cuda" else 2048 * tensor_parallel_size)
    cached = (not older) if enable_prefix_caching is None else enable_prefix_caching
    return KVLayout(
        groups=groups,
        block_size=block,
        page_bytes=block * token_bytes,
        layers_per_block=_layers_per_block([group.layers for group in groups]),
        in_flight_tokens=batched if older or device == "cpu" else 2 * batched,
        state_blocks=2 if cached else 1,
        max_model_len=max_model_len,
    )


def server_layout(
    config: Config,
    server: ServerSpec,
    device: str,
    *,
    max_num_batched_tokens: int | None = None,
    vllm_version: str | None = None,
) -> KVLayout:
    """Return the layout of one server (`kv_layout` with its arguments).

    `max_num_batched_tokens` is what the engine chose where the server leaves it to vLLM. Raises `UnknownKV`.
    """
    block_size = server.extra_args.get("block_size")
    return kv_layout(
        config,
        block_size=None if block_size is None else int(block_size),
        device=device,
        tensor_parallel_size=server.tensor_parallel_size,
        dtype=server.dtype,
        kv_cache_dtype=server.kv_cache_dtype,
        max_num_batched_tokens=server.max_num_batched_tokens or max_num_batched_tokens,
        max_model_len=server.max_model_len,
        enable_prefix_caching=server.enable_prefix_caching,
        vllm_version=vllm_version,
    )


def model_limit(config: Config) -> int | None:
    """Return the largest `--max-model-len` that vLLM accepts, in tokens; None if config.json does not say.

    The smallest of the config's length keys (`model_max_length` before all others), times the RoPE scaling factor where
    that kind of scaling leaves max_position_embeddings unscaled (config/model.py, `_get_and_verify_max_len`).
    """
    text = text_config(config)
    lengths = [text[key] for key in _LENGTH_KEYS if text.get(key) is not None]
    if text.get("model_max_length"):
        lengths = [text["model_max_length"]]
    if not lengths:
        return None
    factor = 1.0
    if "gemma3" not in str(text.get("model_type")):
        for scaling in _rope_scalings(text):
            if scaling.get("rope_type", scaling.get("type", "default")) not in _ALREADY_SCALED:
                factor = scaling.get("factor") or 1.0
    return int(min(lengths) * factor)


def _rope_scalings(text: Config) -> list[Config]:
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    nested: list[Config] = [value for value in scaling.values() if isinstance(value, dict)]
    return nested or [scaling]


def _default_block_size(device: str, groups: tuple[LayerGroup, ...]) -> int:
    if device == "cuda" or any(group.kind == MLA for group in groups):
        return 16
    return 128


def _layers_per_block(counts: list[int]) -> int:
    """Return the group size: the rarest kind's layers, or the commonest's where that pads little (below 1.5 times)."""
    fewest, most = min(counts), max(counts)
    return most if most < 1.5 * fewest else fewest


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)
