"""DeepSeek-V3 and R1: latent attention, shared and routed experts behind a sigmoid router with a constant bias.

The weights are published in FP8 with a scale per block and are dequantised when they are read (`forms`).
"""

from __future__ import annotations

from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.glm import sigmoid_experts
from owpo_megatron.families.model import HFModel, LatentAttention
from owpo_megatron.families.reading import HFConfig, describe
from owpo_megatron.families.rules import (
    HF,
    MEGATRON,
    MLP,
    OUTER,
    ROUTER_BIAS,
    Part,
    Rule,
    experts,
    mlp_norm,
    shared_expert,
)

_OWN, _HF = MEGATRON + "self_attention.", HF + "self_attn."


def latent_attention_rules(model: HFModel) -> tuple[Rule, ...]:
    """Norm before attention, and attention. The down projections are whole on every tensor-parallel rank."""
    assert isinstance(model.attention, LatentAttention)
    queries: tuple[Rule, ...] = (_up("linear_q_proj", "q_proj", "q", "hidden"),)
    if model.attention.q_rank is not None:
        queries = (
            _down("linear_q_down_proj", "q_a_proj", "q_rank"),
            _norm("q_layernorm", "linear_q_up_proj", "q_a_layernorm", "q_rank"),
            _up("linear_q_up_proj", "q_b_proj", "q", "q_rank"),
        )
    return (
        Rule((MEGATRON + "input_layernorm.weight",), (Part(HF + "input_layernorm.weight", ("hidden",)),)),
        *queries,
        _down("linear_kv_down_proj", "kv_a_proj_with_mqa", "kv_down"),
        _norm("kv_layernorm", "linear_kv_up_proj", "kv_a_layernorm", "kv_rank"),
        _up("linear_kv_up_proj", "kv_b_proj", "kv_up", "kv_rank"),
        Rule((_OWN + "linear_proj.weight",), (Part(_HF + "o_proj.weight", ("hidden", "v")),), tp_dim=1),
    )


def _down(own: str, hf: str, rows: str) -> Rule:
    return Rule((f"{_OWN}{own}.weight",), (Part(f"{_HF}{hf}.weight", (rows, "hidden")),))


def _up(own: str, hf: str, rows: str, columns: str) -> Rule:
    return Rule((f"{_OWN}{own}.weight",), (Part(f"{_HF}{hf}.weight", (rows, columns)),), tp_dim=0)


def _norm(own: str, fused_into: str, hf: str, size: str) -> Rule:
    names = (f"{_OWN}{own}.weight", f"{_OWN}{fused_into}.layer_norm_weight")
    return Rule(names, (Part(f"{_HF}{hf}.weight", (size,)),))


def _rules(model: HFModel) -> tuple[Rule, ...]:
    dense = MLP if model.is_mixed else ()
    mlp = (*mlp_norm(), *dense, *experts(), ROUTER_BIAS, *shared_expert("mlp.shared_experts"))
    return (*OUTER, *latent_attention_rules(model), *mlp)


def _read(config: HFConfig) -> HFModel:
    raw = config.raw
    for field, only in (("attention_bias", False), ("rope_interleave", True), ("moe_layer_freq", 1)):
        config.require(field, only)
    config.require("rms_norm_eps", 1e-6)  # the norms of compressed vectors always use this value
    attention = LatentAttention(
        num_heads=raw.num_attention_heads,
        q_rank=raw.q_lora_rank,
        kv_rank=raw.kv_lora_rank,
        nope_dim=raw.qk_nope_head_dim,
        rope_dim=raw.qk_rope_head_dim,
        v_dim=raw.v_head_dim,
    )
    model = describe(config, "deepseek_v3", attention, sigmoid_experts(config))
    yarn = model.rope.yarn
    if model.rope.llama3_factor or (yarn and (yarn.mscale is None or not yarn.truncate)):
        remedy = "latent attention takes the default and yarn with mscale and mscale_all_dim, truncated"
        raise config.refusal("rope_parameters", raw.rope_parameters, remedy)
    return model


_FUSED = {
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj_with_mqa", 1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}

DEEPSEEK_V3 = Family(
    "deepseek_v3", ("deepseek_v3",), _read, _rules, EngineNames(_FUSED), (r"model\.layers\.{num_layers}\.",),
    special="latent attention; sigmoid router with bias and groups, shared expert, dense first layers; block FP8",
)  # fmt: skip
