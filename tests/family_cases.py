"""Tiny random models of every family, in odd shapes: the first of a family is its case in the normal tiers.

Fields are those of the family's HF config, over `tiny.make_hf_model`'s defaults (hidden 48, ffn 80, 4 layers, 4 heads,
2 key-value heads, vocabulary 96).
"""

from __future__ import annotations

from typing import Any

_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GLM_MOE: dict[str, Any] = _MOE | {
    "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
    "head_dim": 16,
}  # fmt: skip

_LATENT: dict[str, Any] = {name: value for name, value in _GLM_MOE.items() if name != "head_dim"} | {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",  # SGLang reads them
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.8,
    },
}  # fmt: skip

_DELTA: dict[str, Any] = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "linear_conv_kernel_dim": 4,
}  # fmt: skip

_NEXT: dict[str, Any] = _MOE | _DELTA | {
    "num_experts": 4, "shared_expert_intermediate_size": 48,
}  # fmt: skip

_V2: dict[str, Any] = _LATENT | {
    "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 2.0,
}  # fmt: skip

_OSS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 16, "sliding_window": 4,
    "swiglu_limit": 7.0,  # SGLang reads it
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    },
}  # fmt: skip

_GEMMA: dict[str, Any] = {
    "head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip

# family -> shapes; the keys "tied" and "vocab_size" are arguments of make_hf_model
CASES: dict[str, list[dict[str, Any]]] = {
    "mixtral": [
        {"num_local_experts": 4, "intermediate_size": 32, "vocab_size": 97},
        {"num_local_experts": 6, "intermediate_size": 64, "num_key_value_heads": 4},
        {"num_local_experts": 3, "intermediate_size": 32, "num_experts_per_tok": 3, "tied": True},
        {"num_local_experts": 5, "intermediate_size": 96, "num_key_value_heads": 1, "sliding_window": 5},
    ],
    "qwen2_moe": [
        _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 48, "vocab_size": 97},
        _MOE | {"num_experts": 6, "shared_expert_intermediate_size": 32, "norm_topk_prob": True, "tied": True},
        _MOE | {"num_experts": 5, "shared_expert_intermediate_size": 64, "num_key_value_heads": 4, "qkv_bias": False},
        _MOE | {"num_experts": 4, "shared_expert_intermediate_size": 24, "vocab_size": 101},
    ],
    "qwen3_next": [
        _NEXT | {"vocab_size": 97},
        _NEXT | {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "num_experts": 5, "tied": True},
        _NEXT | {"linear_num_value_heads": 6, "linear_value_head_dim": 10, "num_key_value_heads": 1, "vocab_size": 101},
        _NEXT | {"num_key_value_heads": 4, "linear_conv_kernel_dim": 3, "norm_topk_prob": False, "num_experts": 6,
                 "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    ],
    "qwen3_5_text": [
        _DELTA | {"vocab_size": 97},
        _DELTA | {"linear_num_key_heads": 4, "num_key_value_heads": 4, "tied": True},
        _DELTA | {"linear_num_value_heads": 6, "linear_value_head_dim": 10, "num_key_value_heads": 1, "vocab_size": 99},
        _DELTA | {"linear_num_key_heads": 1, "linear_conv_kernel_dim": 3, "intermediate_size": 72, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_interleaved": True,
            "mrope_section": [2, 1, 1]},
                  "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    ],
    "qwen3_5_moe_text": [
        _NEXT | {"vocab_size": 97},
        _NEXT | {"linear_num_key_heads": 4, "num_experts": 5, "tied": True},
        _NEXT | {"linear_num_value_heads": 6, "linear_value_head_dim": 10, "num_key_value_heads": 1, "vocab_size": 101},
        _NEXT | {"num_key_value_heads": 4, "linear_conv_kernel_dim": 3, "num_experts_per_tok": 3, "num_experts": 6,
                 "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    ],
    "glm4_moe": [
        _GLM_MOE | {"use_qk_norm": True, "vocab_size": 97},
        _GLM_MOE | {"attention_bias": True, "n_routed_experts": 4, "first_k_dense_replace": 2, "vocab_size": 99},
        _GLM_MOE | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "vocab_size": 101},
        _GLM_MOE | {"first_k_dense_replace": 0, "n_shared_experts": 2, "num_key_value_heads": 1, "tied": True},
    ],
    "deepseek_v3": [
        _LATENT | {"vocab_size": 97},
        _LATENT | {"q_lora_rank": None, "n_routed_experts": 5, "first_k_dense_replace": 0, "v_head_dim": 12},
        _LATENT | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "vocab_size": 101},
        _LATENT | {"num_attention_heads": 6, "num_key_value_heads": 6, "kv_lora_rank": 32, "tied": True},
    ],
    "deepseek_v2": [
        _V2 | {"vocab_size": 97},
        _V2 | {"q_lora_rank": None, "n_routed_experts": 5, "first_k_dense_replace": 0, "v_head_dim": 12},
        _V2 | {"n_routed_experts": 12, "n_group": 6, "topk_group": 2, "num_experts_per_tok": 4,
               "topk_method": "group_limited_greedy", "vocab_size": 101},
        _V2 | {"num_attention_heads": 6, "num_key_value_heads": 6, "kv_lora_rank": 32, "tied": True},
    ],
    "gpt_oss": [
        _OSS | {"vocab_size": 97},
        _OSS | {"num_local_experts": 5, "num_key_value_heads": 4, "sliding_window": 3},
        _OSS | {"num_local_experts": 6, "num_experts_per_tok": 3, "num_attention_heads": 8, "tied": True},
        _OSS | {"num_local_experts": 3, "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 64,
                "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]},
    ],
    "phi3": [
        {"vocab_size": 97},
        {"num_key_value_heads": 1, "tied": True},
        {"num_key_value_heads": 4, "intermediate_size": 72, "partial_rotary_factor": 0.5, "hidden_size": 64},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 4, "vocab_size": 101},
    ],
    "glm4": [
        {"head_dim": 16, "vocab_size": 97},
        {"head_dim": 8, "attention_bias": False, "num_key_value_heads": 1, "tied": True},
        {"head_dim": 16, "partial_rotary_factor": 0.25, "num_key_value_heads": 4},
        {"head_dim": 24, "partial_rotary_factor": 1.0, "intermediate_size": 72, "vocab_size": 101},
    ],
    "olmo2": [
        {"vocab_size": 97},
        {"num_key_value_heads": 1, "tied": True},
        {"num_key_value_heads": 4, "intermediate_size": 72},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 101},
    ],
    "olmo3": [
        {"vocab_size": 97, "sliding_window": 5},
        {"num_key_value_heads": 1, "sliding_window": 3, "tied": True},
        {"num_key_value_heads": 4, "intermediate_size": 72, "sliding_window": 4,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "beta_fast": 32, "beta_slow": 1,
                             "original_max_position_embeddings": 32, "attention_factor": 1.2079441541679836}},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 101, "sliding_window": 64},
    ],
    "gemma3_text": [
        _GEMMA | {"vocab_size": 97},
        _GEMMA | {"num_key_value_heads": 1, "head_dim": 24, "tied": True, "query_pre_attn_scalar": 8},
        _GEMMA | {"num_key_value_heads": 4, "intermediate_size": 72, "sliding_window_pattern": 3, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        _GEMMA | {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 101, "sliding_window": 20},
    ],
    "granite": [
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2, "logits_scaling": 8.0},
        {"attention_multiplier": 0.3, "num_key_value_heads": 1, "tied": True, "vocab_size": 97},
        {"residual_multiplier": 0.5, "attention_multiplier": 0.25, "num_key_value_heads": 4},
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.1, "num_attention_heads": 6, "vocab_size": 101},
    ],
}  # fmt: skip

# Windows of families whose other shapes test_proof.py and test_parity.py have
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5, "vocab_size": 97},
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
}


def every_case() -> list[Any]:
    """pytest parameters (family, shape): the first of each family plain, the others under the mark `matrix`."""
    import pytest

    return [
        pytest.param(family, shape, id=f"{family}-{number}", marks=[pytest.mark.matrix] if number else [])
        for family, shapes in CASES.items()
        for number, shape in enumerate(shapes)
    ]
