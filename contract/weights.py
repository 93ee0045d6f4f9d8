"""An estimate of a model's weights on one GPU, from its config.json.

Called when a grid is planned, to refuse what cannot fit; pure. Good to about 5 %: never to be reported as measured.
"""

from __future__ import annotations

from contract.layers import (
    LINEAR_ATTENTION,
    MLA,
    Config,
    dtype_bytes,
    head_size,
    layer_kinds,
    need,
    text_config,
)

# MLPs of one up and one down projection; all others have a gate besides.
_UNGATED = ("starcoder2", "phi", "gpt_neox", "gptj", "opt", "bloom", "falcon", "gpt2")


def weight_bytes(
    config: Config, tensor_parallel_size: int = 1, dtype: str = "auto", quantization: str | None = None
) -> int:
    """Return the estimated bytes of the weights that one rank holds.

    Embedding and, unless tied, output head; then every layer's attention (or latent or linear attention) and MLP or
    experts. Norms, biases and a vision tower are left out. Matrices are divided among the ranks; routers and the latent
    down-projections are on every rank.

    Args:
        config: content of config.json.
        tensor_parallel_size: ranks, >= 1.
        dtype: vLLM's `--dtype`.
        quantization: vLLM's `--quantization`, for a checkpoint quantized while it is loaded.

    Raises:
        UnknownKV: a size that the estimate needs is missing, or a layer is of a kind that is not covered.
    """
    text = text_config(config)
    element = dtype_bytes(config, dtype)
    table = need(text, "vocab_size") * need(text, "hidden_size")
    tables = table if text.get("tie_word_embeddings", False) else 2 * table
    divided, replicated = 0, 0
    for index, kind in enumerate(layer_kinds(text)):
        for part in (_attention(text, kind), _mlp(text, index)):
            divided += part[0]
            replicated += part[1]
    matrix_bytes = _matrix_bytes(text, element, quantization)
    return int((tables * element + divided * matrix_bytes) / tensor_parallel_size + replicated * matrix_bytes)


def _attention(text: Config, kind: str) -> tuple[int, int]:
    hidden, heads = need(text, "hidden_size"), need(text, "num_attention_heads")
    if kind == MLA:
        rope, latent = need(text, "qk_rope_head_dim"), need(text, "kv_lora_rank")
        nope, value = need(text, "qk_nope_head_dim"), need(text, "v_head_dim")
        query, query_rank = heads * (nope + rope), text.get("q_lora_rank")
        divided = (query_rank or hidden) * query + latent * heads * (nope + value) + heads * value * hidden
        return divided, hidden * (latent + rope) + (hidden * query_rank if query_rank else 0)
    if kind == LINEAR_ATTENTION:
        keys = need(text, "linear_num_key_heads") * need(text, "linear_key_head_dim")
        value_heads = need(text, "linear_num_value_heads")
        values = value_heads * need(text, "linear_value_head_dim")
        projections = hidden * (2 * keys + 2 * values + 2 * value_heads) + values * hidden
        return projections + (2 * keys + values) * need(text, "linear_conv_kernel_dim"), 0
    size = head_size(text)
    gated = str(text.get("model_type")).startswith(("qwen3_next", "qwen3_5"))  # the query projection has a gate besides
    queries = heads * size * (2 if gated else 1)
    return hidden * (queries + 2 * int(text.get("num_key_value_heads") or heads) * size + heads * size), 0


def _mlp(text: Config, index: int) -> tuple[int, int]:
    hidden = need(text, "hidden_size")
    matrices = 2 if text.get("model_type") in _UNGATED else 3
    experts = text.get("num_experts") or text.get("n_routed_experts") or text.get("num_local_experts")
    if not experts or not _is_sparse(text, index):
        return matrices * hidden * need(text, "intermediate_size"), 0
    width = int(text.get("moe_intermediate_size") or need(text, "intermediate_size"))
    shared = text.get("shared_expert_intermediate_size") or width * int(text.get("n_shared_experts") or 0)
    return matrices * hidden * (experts * width + shared), hidden * experts


def _is_sparse(text: Config, index: int) -> bool:
    if index < int(text.get("first_k_dense_replace") or 0) or index in (text.get("mlp_only_layers") or []):
        return False
    if frequency := text.get("moe_layer_freq"):
        return bool(frequency[index]) if isinstance(frequency, list) else index % frequency == 0
    return (index + 1) % int(text.get("decoder_sparse_step") or 1) == 0


def _matrix_bytes(text: Config, element: int, quantization: str | None) -> float:
    settings = text.get("quantization_config") or {}
    bits = settings.get("bits") or settings.get("w_bit")
    if bits:
        return float(bits) / 8
    method = str(settings.get("quant_method") or quantization or "")
    return 1.0 if "fp8" in method else float(element)
