"""The KV formulas against figures known from model cards, from GPUs and from each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contract.kv import (
    FULL,
    LINEAR_ATTENTION,
    MLA,
    SLIDING_WINDOW,
    KVLayout,
    UnknownKV,
    kv_layout,
    layer_groups,
    model_limit,
    weight_bytes,
)
from tests.model_files import published

MIB = 1 << 20


def llama(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 8192,
        **changes,
    }


# --- bytes of a token ---


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [
        ("phi-3-mini-4k", 4096, 393_216),
        ("qwen2.5-1.5b", 32_768, 28_672),
        ("llama-3.1-8b", 131_072, 131_072),
        ("deepseek-v2-lite", 8192, 27 * 576 * 2),
        ("gemma-3-4b", 4096, 143_360),
        ("gemma-3-4b", 65_536, 20_480),
        ("qwen3-next-cut", 4096, 3 * 2048),
        ("tiny", 512, 4096),
    ],
)
def test_one_more_token_costs_what_the_model_card_implies(name: str, length: int, expected: int) -> None:
    assert kv_layout(published(name)).marginal_bytes_per_token(length) == expected


def test_kinds_of_layers_are_told_apart() -> None:
    kinds = {
        name: {group.kind: group.layers for group in layer_groups(published(name))}
        for name in ("phi-3-mini-4k", "qwen2.5-1.5b", "gemma-3-4b", "deepseek-v2-lite", "qwen3-next-cut")
    }
    assert kinds == {
        "phi-3-mini-4k": {SLIDING_WINDOW: 32},
        "qwen2.5-1.5b": {FULL: 28},
        "gemma-3-4b": {SLIDING_WINDOW: 29, FULL: 5},
        "deepseek-v2-lite": {MLA: 27},
        "qwen3-next-cut": {LINEAR_ATTENTION: 9, FULL: 3},
    }


def test_heads_default_to_multi_head_attention_and_their_size_to_the_hidden_size() -> None:
    (group,) = layer_groups(llama())
    assert group.bytes_per_token == 2 * 4 * 64 * 2


def test_a_text_config_is_found_and_its_class_defaults_filled_in() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    assert layer_groups({"model_type": "gemma3", "text_config": text}) == layer_groups(published("gemma-3-4b"))


def test_fp8_cache_halves_a_token_and_leaves_the_linear_state() -> None:
    state, attention = layer_groups(published("qwen3-next-cut"), kv_cache_dtype="fp8")
    assert attention.bytes_per_token == 1024
    assert state.state_bytes == 1_097_728
    assert layer_groups(llama(), dtype="float32")[0].bytes_per_token == 2048


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, FULL),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 4}, FULL),
        (
            {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0},
            SLIDING_WINDOW,
        ),
        ({"model_type": "mistral", "sliding_window": 4096}, SLIDING_WINDOW),
        ({"model_type": "mistral", "sliding_window": None}, FULL),
        ({"model_type": "mistral"}, SLIDING_WINDOW),
    ],
)
def test_a_window_counts_only_where_vllm_uses_it(changes: dict[str, Any], kind: str) -> None:
    assert [group.kind for group in layer_groups(llama(**changes))] == [kind]


# --- figures measured on GPUs ---


def gemma_like(window: int = 512) -> dict[str, Any]:
    return llama(
        model_type="gemma3_text", num_hidden_layers=6, num_key_value_heads=1, head_dim=128, sliding_window=window
    )


def test_gemma_like_capacity_as_measured_on_an_h100_with_0_25_1() -> None:
    layout = kv_layout(gemma_like(), max_num_batched_tokens=2048, vllm_version="0.25.1")
    assert layout.max_concurrency(256 * MIB, 1024) == pytest.approx(84.24, abs=0.005)
    assert layout.max_concurrency(256 * MIB, 4096) == pytest.approx(30.88, abs=0.005)


def test_gemma_like_capacity_as_measured_on_the_cpu_build() -> None:
    layout = kv_layout(gemma_like(), device="cpu")
    assert layout.num_blocks(256 * MIB) == 4096
    assert layout.max_concurrency(256 * MIB, 2048) == pytest.approx(40.55, abs=0.005)


def test_deepseek_like_capacity_as_measured() -> None:
    config = {**published("deepseek-v2-lite"), "num_hidden_layers": 3}
    for device in ("cuda", "cpu"):
        layout = kv_layout(config, device=device)
        assert layout.num_blocks(256 * MIB) == 4854
        assert layout.max_concurrency(256 * MIB, 2048) == pytest.approx(37.92, abs=0.005)
    assert [kv_layout(config).kv_tokens(256 * MIB, length) for length in (1024, 4096)] == [77_664, 77_664]


def test_linear_attention_capacity_as_measured_on_an_h100_with_0_25_1() -> None:
    config = {
        **published("tiny-linear"),
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    }
    layout = kv_layout(config, vllm_version="0.25.1")
    assert layout.block_size == 48
    assert layout.max_concurrency(256 * MIB, 1024) == pytest.approx(436.9, abs=0.05)
    assert layout.max_concurrency(256 * MIB, 4096) == pytest.approx(122.7, abs=0.05)


def test_phi_3_without_its_window_as_measured() -> None:
    config = {**published("phi-3-mini-4k"), "sliding_window": None}
    pool = 32_768 * 393_216
    assert kv_layout(config).kv_tokens(pool, 4096) == 32_768
    assert kv_layout(config).max_concurrency(pool, 4096) == 8.0
    assert kv_layout(config, tensor_parallel_size=2).kv_tokens(pool, 4096) == 2 * 32_768


@pytest.mark.parametrize(("requests", "in_use"), [(4, 0.059), (8, 0.109), (16, 0.202), (32, 0.393), (64, 0.787)])
def test_requests_at_once_hold_what_was_measured_on_an_h100_with_0_25_1(requests: int, in_use: float) -> None:
    """Phi-3-mini's window at 4,088 tokens in a pool of 10,806 blocks; the highest use sampled twice a second.

    vLLM's KV concurrency counts 42 such sequences at most; 64 ran, without a preemption.
    """
    layout = kv_layout(published("phi-3-mini-4k"), max_num_batched_tokens=8192, vllm_version="0.25.1")
    share = layout.blocks_at_once(requests, 4088) / 10_806
    one_prompt = (layout.blocks_per_sequence(4088) - layout.blocks_held(layout.groups[0], 4088)) / 10_806
    assert in_use - 0.0005 <= share <= in_use + 1.1 * one_prompt
    assert requests * layout.blocks_per_sequence(4088) / 10_806 > 1.4 * share or requests < 8


def test_requests_that_grow_past_their_window_hold_what_was_measured_on_an_h100_with_0_25_1() -> None:
    """14 at once of 2,048 + 2,048 tokens: 87.8 % of 2,057 blocks, no preemption. Only prompts have many in flight."""
    layout = kv_layout(published("phi-3-mini-4k"), max_num_batched_tokens=8192, vllm_version="0.25.1")
    assert layout.blocks_at_once(14, 4096, 2048) / 2_056 == pytest.approx(0.878, abs=0.0005), (
        "the null block is no part"
    )
    assert layout.blocks_at_once(14, 4096) > 2_057
    assert layout.blocks_at_once(14, 4096, 4096) == layout.blocks_at_once(14, 4096)


def peak_of_vllms_scheduler(layout: KVLayout, requests: int, prompt: int, length: int) -> int:
    """The most blocks held in a closed loop on one windowed group, by vLLM's order: those that run, then who waits.

    A step has `in_flight_tokens`. A request frees what its window has left behind when it is scheduled, then allocates.
    """
    (group,) = layout.groups
    window, block = group.window or length, layout.block_size
    running: list[list[int]] = []  # tokens computed; blocks left behind; blocks allocated
    peak, left = 0, 3 * requests
    while left or running:
        budget = layout.in_flight_tokens
        for request in running:
            step = min(budget, prompt - request[0] if request[0] < prompt else 1)
            if step:
                request[1] = max(0, request[0] - window + 1) // block
                request[0] += step
                request[2] = -(-request[0] // block)
                budget -= step
        while budget and left and len(running) < requests:
            step, left = min(budget, prompt), left - 1
            running.append([step, 0, -(-step // block)])
            budget -= step
        peak = max(peak, layout.tables(group) * sum(end - start for _, start, end in running))
        running = [request for request in running if request[0] < length]
    return peak


def windowed(window: int, budget: int) -> KVLayout:
    config = llama(model_type="mistral", sliding_window=window)
    return kv_layout(config, max_num_batched_tokens=budget, vllm_version="0.25.1")


def test_a_prompt_of_several_steps_has_all_its_tokens_in_flight_outside_of_its_window() -> None:
    """From its second step on. The mean share of its tokens outside, a quarter here, would be 60 blocks short."""
    layout = windowed(2047, 2048)
    peak = peak_of_vllms_scheduler(layout, 4, 4024, 4088)
    assert peak > 4 * 129 + 2048 * (4024 - 2047) / 4024 / 16 + 50
    assert peak <= layout.blocks_at_once(4, 4088, 4024) <= peak + 4
    assert layout.in_flight_blocks(8192) == 128, "no prompt can end in a step"


@settings(deadline=None, max_examples=60)
@given(
    window=st.integers(17, 300), budget=st.integers(8, 600), prompt=st.integers(1, 500), answer=st.integers(1, 60),
    requests=st.integers(1, 8),
)  # fmt: skip
def test_requests_at_once_never_hold_more_than_is_said(
    window: int, budget: int, prompt: int, answer: int, requests: int
) -> None:
    layout = windowed(window, budget)
    peak = peak_of_vllms_scheduler(layout, requests, prompt, prompt + answer)
    assert peak <= layout.blocks_at_once(requests, prompt + answer, prompt)


# --- how vLLM lays blocks out ---


def test_a_window_keeps_its_tokens_those_in_flight_and_one_block() -> None:
    layout = kv_layout(llama(model_type="mistral", sliding_window=1024), max_num_batched_tokens=512)
    assert layout.blocks_per_sequence(512) == 512 // 16 + 1
    assert layout.blocks_per_sequence(8192) == (1023 + 1024 + 15) // 16 + 1
    assert layout.marginal_bytes_per_token(8192) == 0


@pytest.mark.parametrize(
    ("name", "kind", "until"),
    [
        ("tiny-sliding", SLIDING_WINDOW, 511 + 768),
        ("tiny-sliding", FULL, None),
        ("tiny-mla", MLA, None),
        ("tiny-linear", LINEAR_ATTENTION, 0),
    ],
)
def test_a_group_stops_growing_where_its_kind_says(name: str, kind: str, until: int | None) -> None:
    layout = kv_layout(published(name), device="cpu", max_num_batched_tokens=768)
    (group,) = [group for group in layout.groups if group.kind == kind]
    assert layout.grows_until(group) == until
    grown = [layout.blocks_of(group, length) for length in range(1, 4000)]
    last = max((at for at, (a, b) in enumerate(pairwise(grown), start=1) if a != b), default=0)
    if until is None:
        assert last >= 4000 - layout.block_size
    else:
        assert last <= until <= last + layout.block_size


def test_without_windows_requests_hold_what_vllm_counts() -> None:
    for name in ("tiny", "tiny-mla", "tiny-linear"):
        layout = kv_layout(published(name), device="cpu")
        assert layout.blocks_at_once(7, 3000) == 7 * layout.blocks_per_sequence(3000)


def test_layers_are_cut_into_groups_of_the_rarest_kind() -> None:
    layout = kv_layout(published("gemma-3-4b"))  # 29 windows in 6 groups of 5, one of them padded
    assert layout.layers_per_block == 5
    assert layout.blocks_per_sequence(1024) == 64 + 6 * 65


def test_kinds_of_nearly_equal_number_are_padded_instead() -> None:
    types = ["sliding_attention"] * 12 + ["full_attention"] * 13
    config = llama(num_hidden_layers=25, layer_types=types, sliding_window=128)
    layout = kv_layout(config, max_num_batched_tokens=512)
    assert layout.layers_per_block == 13
    assert layout.blocks_per_sequence(512) == 32 + 33


def test_a_block_grows_until_a_page_holds_a_linear_state() -> None:
    assert kv_layout(published("qwen3-next-cut")).block_size == 544
    assert kv_layout(published("qwen3-next-cut"), device="cpu").block_size == 1152  # its temporal state is float32
    assert kv_layout(published("qwen3-next-cut"), block_size=544).block_size == 544


def test_prefix_caching_keeps_a_second_state() -> None:
    config = published("qwen3-next-cut")
    cached, uncached = (kv_layout(config, enable_prefix_caching=on).blocks_per_sequence(544) for on in (True, False))
    assert (cached, uncached) == (1 + 3 * 2, 1 + 3 * 1)
    assert kv_layout(config).blocks_per_sequence(544) == cached
    assert kv_layout(config, vllm_version="0.25.1").blocks_per_sequence(544) == uncached


def test_default_block_sizes() -> None:
    assert kv_layout(llama()).block_size == 16
    assert kv_layout(llama(), device="cpu").block_size == 128
    assert kv_layout(published("tiny-mla"), device="cpu").block_size == 16
    assert kv_layout(llama(), block_size=32).block_size == 32


# --- properties ---

NAMES = ("tiny", "tiny-sliding", "tiny-mla", "tiny-linear", "phi-3-mini-4k", "gemma-3-4b", "qwen3-next-cut")
LENGTHS = st.integers(min_value=1, max_value=200_000)


@settings(deadline=None)
@given(
    name=st.sampled_from(NAMES), short=LENGTHS, more=st.integers(0, 100_000), device=st.sampled_from(["cuda", "cpu"])
)
def test_a_longer_sequence_never_needs_less(name: str, short: int, more: int, device: str) -> None:
    layout = kv_layout(published(name), device=device)
    assert layout.bytes_per_sequence(short) <= layout.bytes_per_sequence(short + more)
    assert layout.marginal_bytes_per_token(short) >= layout.marginal_bytes_per_token(short + more) >= 0


@settings(deadline=None)
@given(name=st.sampled_from(NAMES), requests=st.integers(1, 500), length=LENGTHS, more=st.integers(0, 5_000))
def test_more_or_longer_requests_never_need_less(name: str, requests: int, length: int, more: int) -> None:
    layout = kv_layout(published(name))
    need = layout.blocks_at_once(requests, length)
    assert layout.blocks_at_once(1, length) <= need <= requests * layout.blocks_per_sequence(length)
    assert need <= layout.blocks_at_once(requests + 1, length)
    assert need <= layout.blocks_at_once(requests, length + more)


def most_held(window: int, budget: int, requests: int, prompt: int, length: int) -> int:
    """Return the most blocks of 16 tokens that requests hold when all are sent at once.

    First come, first served; a step computes at most `budget` tokens, and a window's blocks go once it has moved past
    them (v1/core/sched/scheduler.py, `remove_skipped_blocks`).
    """
    computed, most = [0] * requests, 0
    while any(tokens < length for tokens in computed):
        left, held = budget, 0
        for i, before in enumerate(computed):
            if before < length:
                new = min(prompt - before if before < prompt else 1, left)
                left -= new
                computed[i] += new
                held += -(-computed[i] // 16) - max(0, before - window + 1) // 16
        most = max(most, held)
    return most


@settings(deadline=None)
@given(
    window=st.integers(2, 100),
    budget=st.integers(1, 300),
    requests=st.integers(1, 12),
    prompt=st.integers(1, 400),
    answer=st.integers(0, 60),
)
@example(window=100, budget=172, requests=1, prompt=360, answer=31)  # its second step is all outside of the window
def test_requests_never_hold_more_than_they_are_said_to(
    window: int, budget: int, requests: int, prompt: int, answer: int
) -> None:
    config = llama(model_type="mistral", sliding_window=window)
    layout = kv_layout(config, max_num_batched_tokens=budget, vllm_version="0.25.1")
    held = most_held(window, budget, requests, prompt, prompt + answer)
    assert held <= layout.blocks_at_once(requests, prompt + answer, prompt)


@settings(deadline=None)
@given(name=st.sampled_from(NAMES), sequences=st.integers(1, 500), length=LENGTHS)
def test_a_pool_for_s_sequences_holds_s_and_not_one_more(name: str, sequences: int, length: int) -> None:
    layout = kv_layout(published(name))
    pool = layout.pool_bytes(sequences, length)
    assert (layout.num_blocks(pool) - 1) // layout.blocks_per_sequence(length) == sequences
    assert sequences <= layout.max_concurrency(pool, length) <= sequences + 1
    assert layout.kv_tokens(pool, length) == int(layout.max_concurrency(pool, length) * length)
    smaller = layout.num_blocks(pool - 1) - 1
    assert smaller // layout.blocks_per_sequence(length) == sequences - 1


@settings(deadline=None)
@given(length=st.integers(1, 100_000), blocks=st.integers(1, 50))
def test_the_slope_is_the_cost_of_a_block_over_its_tokens(length: int, blocks: int) -> None:
    layout = kv_layout(published("llama-3.1-8b"))
    step = layout.bytes_per_sequence(length + 16 * blocks) - layout.bytes_per_sequence(length)
    assert step == layout.marginal_bytes_per_token(length) * 16 * blocks


@settings(deadline=None)
@given(heads=st.sampled_from([8, 16, 32]), ranks=st.sampled_from([1, 2, 4, 8]), length=LENGTHS)
def test_ranks_share_full_attention(heads: int, ranks: int, length: int) -> None:
    config = llama(num_attention_heads=heads, num_key_value_heads=heads, head_dim=64)
    whole, part = kv_layout(config), kv_layout(config, tensor_parallel_size=ranks)
    assert part.bytes_per_sequence(length) * ranks == whole.bytes_per_sequence(length)


def test_ranks_do_not_share_a_latent_and_at_last_not_a_head() -> None:
    mla = published("deepseek-v2-lite")
    assert layer_groups(mla, tensor_parallel_size=4) == layer_groups(mla)
    few = llama(num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    sizes = [layer_groups(few, ranks)[0].bytes_per_token for ranks in (1, 2, 4)]
    assert sizes == [512, 256, 256]


def test_ranks_share_a_linear_state() -> None:
    whole, half = (layer_groups(published("qwen3-next-cut"), ranks)[0].state_bytes for ranks in (1, 2))
    assert half * 2 == whole


# --- what is not known is said so ---


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "num_hidden_layers"),
        (llama(num_kv_shared_layers=2), "share their KV cache"),
        (llama(attention_chunk_size=8192), "chunked"),
        (llama(mamba_d_state=128), "state-space"),
        (llama(layer_types=["mamba"] * 4), "'mamba'"),
        (llama(layer_types=["full_attention"]), "1 layer_types for 4 layers"),
        (llama(v_head_dim=32), "differ in size"),
        (llama(kv_lora_rank=512), "differ in size"),
        (llama(layer_types=["linear_attention"] * 4), "linear"),
        (llama(quantization_config={"kv_cache_quant_algo": "FP8"}), "kv_cache_dtype"),
        (llama(model_type="qwen2", sliding_window=1, use_sliding_window=True, max_window_layers=2), "some layers"),
    ],
)
def test_an_uncovered_feature_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownKV, match=words):
        kv_layout(config)


def test_uncovered_types_and_ranks_are_named() -> None:
    with pytest.raises(UnknownKV, match="nvfp4"):
        kv_layout(llama(), kv_cache_dtype="nvfp4")
    with pytest.raises(UnknownKV, match="int3"):
        kv_layout(llama(), dtype="int3")
    with pytest.raises(UnknownKV, match="3 ranks"):
        kv_layout(llama(), tensor_parallel_size=3)


# --- the length vLLM accepts ---


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("phi-3-mini-4k", 4096),
        ("qwen2.5-1.5b", 32_768),
        ("llama-3.1-8b", 131_072),
        ("gemma-3-4b", 131_072),
        ("deepseek-v2-lite", 163_840),
        ("qwen3-next-cut", 262_144),
        ("tiny", 8192),
    ],
)
def test_the_longest_length_of_each_model(name: str, limit: int) -> None:
    assert model_limit(published(name)) == limit


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 16_384),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, 32_768),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, 8192),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 16_384),
        ({"rope_scaling": None}, 8192),
        ({"model_max_length": 2048}, 2048),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_rope_scaling_moves_the_longest_length_where_vllm_says_so(changes: dict[str, Any], limit: int | None) -> None:
    assert model_limit(llama(**changes)) == limit


# --- weights ---


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("phi-3-mini-4k", 3_821_079_552),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("llama-3.1-8b", 8_030_261_248),
        ("deepseek-v2-lite", 15_706_484_224),
        ("gemma-3-4b", 3_880_263_168),
    ],
)
def test_weights_are_within_five_percent_of_the_published_parameters(name: str, parameters: int) -> None:
    assert weight_bytes(published(name)) == pytest.approx(2 * parameters, rel=0.05)


def test_qwen3_next_uncut_has_eighty_billion_parameters() -> None:
    config = {**published("qwen3-next-cut"), "num_hidden_layers": 48, "num_experts": 512}
    assert weight_bytes(config) == pytest.approx(2 * 79.7e9, rel=0.05)


def test_ranks_divide_the_weights_and_fp8_halves_the_matrices() -> None:
    config = published("llama-3.1-8b")
    assert weight_bytes(config, 2) * 2 == weight_bytes(config)
    assert weight_bytes(config, quantization="fp8") == pytest.approx(weight_bytes(config) * 0.565, rel=0.01)
