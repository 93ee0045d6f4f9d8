"""Which kind of KV cache each layer of a model needs, read from its Hugging Face config.json.

Called by `contract.kv` and `contract.weights`; pure. It must never guess: a feature it does not know is an `UnknownKV`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FULL = "full"
SLIDING_WINDOW = "sliding_window"
MLA = "mla"
LINEAR_ATTENTION = "linear_attention"

Config = Mapping[str, Any]


class UnknownKV(ValueError):
    """The config has a feature whose KV cache these formulas do not cover; callers then say "not known"."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose caches have the same kind and size.

    Attributes:
        kind: `full` (every token's K and V), `sliding_window` (those of the last `window` tokens), `mla` (one latent
            vector a token) or `linear_attention` (a state of constant size a sequence).
        layers: how many of the model's layers are of this kind.
        bytes_per_token: of one layer on one tensor-parallel rank; 0 for `linear_attention`.
        window: tokens, for `sliding_window` only.
        state_bytes: of one layer and one sequence on one rank, for `linear_attention` only.
    """

    kind: str
    layers: int
    bytes_per_token: int
    window: int | None = None
    state_bytes: int = 0


# What transformers' configuration classes fill in for keys that published config.json files leave out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "gemma2": {"sliding_window": 4096, "head_dim": 256, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {"sliding_window": 128, "sliding_window_pattern": 2},
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4, "tie_word_embeddings": True},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "gemma": {"tie_word_embeddings": True},
    "cohere": {"tie_word_embeddings": True},
    "starcoder2": {"tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},
    "qwen3_next": {"full_attention_interval": 4},
}

# Model types whose config classes drop `sliding_window` unless `use_sliding_window` is true.
_SWITCHED_WINDOW = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")

# transformers_utils/model_arch_config_convertor.py::is_deepseek_mla, less the types with caches of their own.
_MLA_MODEL_TYPES = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "pangu_ultra_moe")

_NOT_COVERED = {
    "num_kv_shared_layers": "layers that share their KV cache",
    "attention_chunk_size": "chunked local attention",
    "index_topk": "sparse attention with an indexer cache",
    "compress_ratios": "compressed sparse attention",
    "linear_attn_config": "Kimi delta attention",
    "attn_layer_indices": "a state-space hybrid",
    "attn_layer_period": "a state-space hybrid",
    "hybrid_override_pattern": "a state-space hybrid",
    "layers_block_type": "a state-space hybrid",
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
    "state_size": "state-space layers",
    "global_head_dim": "head sizes that differ between layers",
    "swa_num_key_value_heads": "heads that differ between layers",
    "attention_other_setting": "heads that differ between layers",
    "block_configs": "layers that differ from each other",
    "multi_query": "Falcon's attention",
    "attn_config": "a nested attention config",
    "is_encoder_decoder": "an encoder",
}

_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_KV_DTYPE_BYTES = {**_DTYPE_BYTES, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


def text_config(config: Config) -> dict[str, Any]:
    """Return the language model's part of a config.json, with the defaults of its class filled in."""
    text = dict(config.get("text_config") or config)
    for key in ("quantization_config", "torch_dtype", "dtype", "tie_word_embeddings"):
        if key in config:
            text.setdefault(key, config[key])
    return {**_DEFAULTS.get(text.get("model_type", ""), {}), **text}


def dtype_bytes(config: Config, dtype: str = "auto") -> int:
    """Return bytes of one weight or activation as vLLM resolves `--dtype`.

    `auto` takes the config's own type; a float32 checkpoint is served in a 16-bit type (config/model.py,
    `_resolve_auto_dtype`).
    """
    if dtype == "auto":
        return 2
    if dtype not in _DTYPE_BYTES:
        raise UnknownKV(f"the size of dtype {dtype!r} is not known")
    return _DTYPE_BYTES[dtype]


def kv_dtype_bytes(config: Config, dtype: str = "auto", kv_cache_dtype: str = "auto") -> int:
    """Return bytes of one cached K or V element: `auto` is what the checkpoint's quantization names, else `dtype`."""
    if kv_cache_dtype == "auto":
        quantization = text_config(config).get("quantization_config") or {}
        named = quantization.get("kv_cache_quant_algo") or quantization.get("kv_cache_scheme")
        if named is not None:
            raise UnknownKV("the checkpoint names a type of its own for the KV cache: set kv_cache_dtype")
        return dtype_bytes(config, dtype)
    if kv_cache_dtype not in _KV_DTYPE_BYTES:
        raise UnknownKV(f"the size of kv_cache_dtype {kv_cache_dtype!r} is not known")
    return _KV_DTYPE_BYTES[kv_cache_dtype]


def head_size(text: Config) -> int:
    """Return the size of one attention head: `head_dim`, by default hidden_size / num_attention_heads."""
    return int(text.get("head_dim") or need(text, "hidden_size") // need(text, "num_attention_heads"))


def kv_heads(text: Config, tensor_parallel_size: int = 1) -> int:
    """Return KV heads of one rank: they are divided among the ranks, and replicated once there are too few."""
    total = int(text.get("num_key_value_heads") or need(text, "num_attention_heads"))
    heads = need(text, "num_attention_heads")
    if heads % tensor_parallel_size or (total % tensor_parallel_size and tensor_parallel_size % total):
        raise UnknownKV(f"{heads} heads with {total} KV heads cannot be divided among {tensor_parallel_size} ranks")
    return max(1, total // tensor_parallel_size)


def need(text: Config, key: str) -> int:
    """Return an integer the formulas cannot do without."""
    value = text.get(key)
    if not isinstance(value, int) or value <= 0:
        raise UnknownKV(f"config.json has no usable {key!r}")
    return value


def uses_mla(text: Config) -> bool:
    """Whether vLLM runs this model with multi-head latent attention."""
    return text.get("model_type") in _MLA_MODEL_TYPES and text.get("kv_lora_rank") is not None


def layer_kinds(text: Config) -> tuple[str, ...]:
    """Return the cache kind of every layer, in order."""
    layers = need(text, "num_hidden_layers")
    if uses_mla(text):
        return (MLA,) * layers
    types = text.get("layer_types")
    if types is None:
        return tuple(_kind_by_rule(text, index, layers) for index in range(layers))
    names = {
        "full_attention": FULL,
        "attention": FULL,
        "sliding_attention": SLIDING_WINDOW,
        "linear_attention": LINEAR_ATTENTION,
    }
    if unknown := sorted({str(name) for name in types} - set(names)):
        raise UnknownKV(f"layer type {unknown[0]!r} is not covered")
    if len(types) != layers:
        raise UnknownKV(f"{len(types)} layer_types for {layers} layers")
    kinds = tuple(names[name] for name in types)
    if text.get("model_type") in ("qwen2", "qwen3") and FULL in kinds and SLIDING_WINDOW in kinds:
        raise UnknownKV("vLLM does not serve a sliding window on some layers of this model type only")
    return kinds


def _kind_by_rule(text: Config, index: int, layers: int) -> str:
    if interval := text.get("full_attention_interval"):
        return FULL if (index + 1) % interval == 0 else LINEAR_ATTENTION
    if not text.get("sliding_window"):
        return FULL
    if text.get("model_type") in _SWITCHED_WINDOW:
        if not text.get("use_sliding_window"):
            return FULL
        if 0 < text.get("max_window_layers", 28) < layers:
            raise UnknownKV("vLLM does not serve a sliding window on some layers of this model type only")
        return FULL if text.get("max_window_layers", 28) >= layers else SLIDING_WINDOW
    pattern = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
    if pattern is None:
        return SLIDING_WINDOW  # Mistral, Phi-3, Starcoder2: CacheConfig.sliding_window is set for every layer
    if not isinstance(pattern, int):
        raise UnknownKV(f"sliding_window_pattern {pattern!r} is not covered")
    return FULL if (index + 1) % pattern == 0 else SLIDING_WINDOW


def layer_groups(
    config: Config,
    tensor_parallel_size: int = 1,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    device: str = "cuda",
) -> tuple[LayerGroup, ...]:
    """Return the model's layers by kind of cache, in order of first appearance.

    Formulas (vLLM's v1/kv_cache_interface.py), for one layer and one token on one rank:

    - attention: 2 * KV heads / ranks (at least 1) * head size * bytes of an element;
    - MLA: (kv_lora_rank + qk_rope_head_dim) * bytes of an element, the same on every rank;
    - gated delta net: for one sequence `conv + temporal` (model_executor/layers/mamba/mamba_utils.py), where
      conv = (conv kernel - 1) * (2 * key heads * key size + value heads * value size) / ranks and
      temporal = value heads / ranks * value size * key size elements of the model's dtype; on CPUs (those with
      AVX-512 BF16) the temporal state is float32 (platforms/cpu.py).

    Args:
        config: content of config.json, with or without `text_config`.
        tensor_parallel_size: ranks, >= 1.
        dtype: vLLM's `--dtype`.
        kv_cache_dtype: vLLM's `--kv-cache-dtype`.
        device: `cuda` or `cpu`.

    Raises:
        UnknownKV: the model has a feature that is not covered.

    Example:
        >>> layer_groups({"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        ...               "hidden_size": 1536, "model_type": "qwen2"})
        (LayerGroup(kind='full', layers=28, bytes_per_token=1024, window=None, state_bytes=0),)
    """
    text = text_config(config)
    for key, words in _NOT_COVERED.items():
        if text.get(key):
            raise UnknownKV(f"{words} ({key!r} in config.json) is not covered by the KV formulas")
    kinds = layer_kinds(text)
    element = kv_dtype_bytes(config, dtype, kv_cache_dtype)
    if not uses_mla(text) and (
        text.get("kv_lora_rank") or (text.get("v_head_dim") or head_size(text)) != head_size(text)
    ):
        raise UnknownKV("heads of K and V differ in size")
    groups = []
    for kind in dict.fromkeys(kinds):
        layers = kinds.count(kind)
        if kind == MLA:
            latent = need(text, "kv_lora_rank") + need(text, "qk_rope_head_dim")
            groups.append(LayerGroup(kind, layers, latent * element))
        elif kind == LINEAR_ATTENTION:
            state = _delta_net_state_bytes(text, tensor_parallel_size, dtype_bytes(config, dtype), device)
            groups.append(LayerGroup(kind, layers, 0, state_bytes=state))
        else:
            token = 2 * kv_heads(text, tensor_parallel_size) * head_size(text) * element
            window = need(text, "sliding_window") if kind == SLIDING_WINDOW else None
            groups.append(LayerGroup(kind, layers, token, window))
    return tuple(groups)


def _delta_net_state_bytes(text: Config, ranks: int, element: int, device: str) -> int:
    keys, key_size = need(text, "linear_num_key_heads"), need(text, "linear_key_head_dim")
    values, value_size = need(text, "linear_num_value_heads"), need(text, "linear_value_head_dim")
    if keys % ranks or values % ranks:
        raise UnknownKV(f"{keys} and {values} linear attention heads cannot be divided among {ranks} ranks")
    channels = 2 * keys * key_size + values * value_size
    conv = (need(text, "linear_conv_kernel_dim") - 1) * channels // ranks
    temporal = values // ranks * value_size * key_size
    # Qwen3.5 names a type for the temporal state (model_executor/models/config.py).
    named = text.get("mamba_ssm_dtype") if str(text.get("model_type")).startswith("qwen3_5") else None
    temporal_element = 4 if device == "cpu" else _DTYPE_BYTES[named] if named else element
    return conv * element + temporal * temporal_element
