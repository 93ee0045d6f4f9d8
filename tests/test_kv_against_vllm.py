"""Our KV layout against vLLM's own classes, without starting an engine.

vLLM is asked in a process of its own (this file run as a script), for importing it changes the process that does so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from test_kv import gemma_like

from contract.kv import kv_layout, model_limit
from contract.specs import ModelSpec
from tests.model_files import published
from workers.models import write_model_dir

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

POOL = 1 << 30
BATCHED = 768


def models() -> dict[str, dict[str, Any]]:
    """Return the configs to compare: ours, and one of each way to write a window."""
    tiny = published("tiny")
    return {
        **{name: published(name) for name in ("tiny", "tiny-sliding", "tiny-mla", "tiny-linear", "qwen3-next-cut")},
        "phi-3": published("phi-3-mini-4k"),
        "qwen2": published("qwen2.5-1.5b"),
        "gemma-like": {**published("gemma-3-4b"), **gemma_like(), "max_position_embeddings": 8192},
        "gemma-34-layers": published("gemma-3-4b"),
        "uneven": {
            **tiny,
            "num_hidden_layers": 9,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 4,
            "sliding_window": 256,
        },
        "few-kv-heads": {**tiny, "num_key_value_heads": 1},
    }


def lengths(config: dict[str, Any]) -> list[int]:
    """Return lengths on both sides of every kink that a config has on any device and with any number of ranks.

    Kinks are the first blocks' ends, and where a window stops growing; beside them some lengths that are none.
    """
    found = {64, 1000, 4096}
    for device, ranks in product(("cpu", "cuda"), (1, 2)):
        layout = kv_layout(config, device=device, tensor_parallel_size=ranks, max_num_batched_tokens=BATCHED)
        ends = [layout.block_size, 2 * layout.block_size]
        ends += [until for group in layout.groups if (until := layout.grows_until(group))]
        found |= {end + side for end in ends for side in (-1, 0, 1, layout.block_size)}
    return sorted(found)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("models")
    for name, config in models().items():
        write_model_dir(ModelSpec(name=name, config=config, dummy_weights=True), root / name)
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(root)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", models())
def test_layout_is_vllms(name: str, device: str, answers: dict[str, Any]) -> None:
    for ranks in (1, 2):
        answer = answers[name][device][str(ranks)]
        layout = kv_layout(
            models()[name],
            device=device,
            tensor_parallel_size=ranks,
            max_num_batched_tokens=BATCHED,
            enable_prefix_caching=answers[name]["prefix_caching"],
        )
        assert layout.block_size == answer["block_size"]
        assert layout.bytes_per_block == answer["bytes_per_block"]
        assert layout.num_blocks(POOL) == answer["num_blocks"]
        for length in lengths(models()[name]):
            tokens, concurrency = answer["capacity"][str(length)]
            assert layout.max_concurrency(POOL, length) == concurrency
            assert layout.kv_tokens(POOL, length) == tokens
            assert layout.bytes_per_sequence(length) == answer["sequence_bytes"][str(length)]


@pytest.mark.parametrize("name", ["tiny-sliding", "gemma-like", "gemma-34-layers", "uneven"])
def test_lengths_lie_on_both_sides_of_the_windows_kink(name: str, answers: dict[str, Any]) -> None:
    """vLLM's own figures bend there: past the kink a token costs only what full attention keeps of it."""
    for device in ("cpu", "cuda"):
        layout = kv_layout(models()[name], device=device, max_num_batched_tokens=BATCHED)
        (until,) = [until for group in layout.groups if (until := layout.grows_until(group))]
        said = {int(length): size for length, size in answers[name][device]["1"]["sequence_bytes"].items()}
        block = layout.block_size
        assert said[until + block] - said[until] < said[2 * block] - said[block]


@pytest.mark.parametrize("name", models())
def test_longest_length_is_vllms(name: str, answers: dict[str, Any]) -> None:
    assert model_limit(models()[name]) == answers[name]["limit"]


# --- what vLLM says: run as a script ---


def ask_vllm(directory: Path) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    arguments = EngineArgs(
        model=str(directory), load_format="dummy", enforce_eager=True, max_num_batched_tokens=BATCHED, max_num_seqs=8
    )
    config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    limit, hybrid = config.model_config.max_model_len, config.model_config.is_hybrid
    prefix_caching = config.cache_config.enable_prefix_caching
    cpu_block, mla = config.cache_config.block_size, config.model_config.use_mla

    class GPUBackend(CPUAttentionBackend):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [MultipleOf(16)]

    found: dict[str, Any] = {"limit": limit, "prefix_caching": prefix_caching}
    for device, backend, block in (("cpu", CPUAttentionBackend, cpu_block), ("cuda", GPUBackend, 16)):
        config.cache_config.mamba_ssm_cache_dtype = "float32" if device == "cpu" else "auto"
        config.scheduler_config.max_num_batched_tokens = BATCHED
        config.scheduler_config.async_scheduling = device == "cuda"
        found[device] = {}
        for ranks in (1, 2):
            config.parallel_config.tensor_parallel_size = ranks
            config.cache_config.block_size = 16 if mla else block  # on CPUs with AMX it would be 128
            config.cache_config.mamba_page_size_padded = None
            found[device][ranks] = layout_of(config, backend, hybrid, lengths(models()[directory.name]))
    return found


def layout_of(config: Any, backend: Any, hybrid: bool, asked: list[int]) -> dict[str, Any]:
    from vllm.platforms import current_platform
    from vllm.v1.core import kv_cache_utils as utils

    if hybrid:
        current_platform._align_hybrid_block_size(config, backend)
    config.cache_config.kv_cache_layout = "LBHNC"
    groups = utils.get_kv_cache_groups(config, layer_specs(config))
    pool = utils.get_kv_cache_config_from_groups(config, groups, POOL)
    capacity, sequence_bytes, limit = {}, {}, config.model_config.max_model_len
    for length in asked:
        config.model_config.max_model_len = length
        capacity[length] = utils.get_kv_cache_capacity(config, pool)
        sequence_bytes[length] = utils._max_memory_usage_bytes_from_groups(config, groups)
    config.model_config.max_model_len = limit
    return {
        "block_size": config.cache_config.block_size,
        "bytes_per_block": utils._pool_bytes_per_block(config, groups),
        "num_blocks": pool.num_blocks,
        "capacity": capacity,
        "sequence_bytes": sequence_bytes,
    }


def layer_specs(config: Any) -> dict[str, Any]:
    """Return what each layer of the model would report (Attention.get_kv_cache_spec and its like)."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec, SlidingWindowSpec

    model, cache = config.model_config, config.cache_config
    shape = {"block_size": cache.block_size, "head_size": model.get_head_size(), "dtype": model.dtype}
    types = getattr(model.hf_text_config, "layer_types", None)
    specs: dict[str, Any] = {}
    for index in range(model.get_total_num_hidden_layers()):
        kind = types[index] if types else None
        window = model.hf_text_config.sliding_window if kind == "sliding_attention" else cache.sliding_window
        if model.use_mla:
            spec: Any = MLAAttentionSpec(num_kv_heads=1, **shape)
        elif kind == "linear_attention":
            model_class, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
            spec = MambaSpec(
                block_size=cache.mamba_block_size or 16,
                shapes=model_class.get_mamba_state_shape_from_config(config),
                dtypes=model_class.get_mamba_state_dtype_from_config(config),
                page_size_padded=cache.mamba_page_size_padded,
                mamba_cache_mode=cache.mamba_cache_mode,
            )
        elif window is not None:
            heads = model.get_num_kv_heads(config.parallel_config)
            spec = SlidingWindowSpec(num_kv_heads=heads, sliding_window=window, **shape)
        else:
            spec = FullAttentionSpec(num_kv_heads=model.get_num_kv_heads(config.parallel_config), **shape)
        specs[str(index)] = spec
    return specs


if __name__ == "__main__":
    print(json.dumps({path.name: ask_vllm(path) for path in sorted(Path(sys.argv[1]).iterdir())}))
