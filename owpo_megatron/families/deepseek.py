"""DeepSeek-V3, R1 and Kimi-K2: latent attention, shared and routed experts, a sigmoid router with a constant bias.

The weights are published in FP8 with a scale per block and are dequantised when they are read (`forms`). DeepSeek-V2
has a softmax router instead, which may choose groups by their best expert.
"""

from __future__ import annotations

from dataclasses import replace

from owpo_megatron.families.attention import LatentAttention
from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.glm import shared_mixture, sigmoid_experts
from owpo_megatron.families.mlp import Experts, Router
from owpo_megatron.families.model import HFModel
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
    assert model.experts is not None
    dense = MLP if model.is_mixed else ()
    bias = (ROUTER_BIAS,) if model.experts.router.bias else ()
    mlp = (*mlp_norm(), *dense, *experts(), *bias, *shared_expert("mlp.shared_experts"))
    return (*OUTER, *latent_attention_rules(model), *mlp)


def _read_v3(config: HFConfig) -> HFModel:
    config.require("rope_interleave", True)
    return _read(config, "deepseek_v3", sigmoid_experts(config))


def _read_v2(config: HFConfig) -> HFModel:
    raw = config.raw
    config.require("norm_topk_prob", False)
    router = Router(raw.num_experts_per_tok, normalised=False, best=1, scale=raw.routed_scaling_factor)
    if raw.topk_method == "group_limited_greedy":
        router = replace(router, groups=raw.n_group, chosen_groups=raw.topk_group)
    elif raw.topk_method != "greedy":
        raise config.refusal("topk_method", raw.topk_method, "not supported; use greedy or group_limited_greedy")
    return _read(config, "deepseek_v2", shared_mixture(config, router))


def _read(config: HFConfig, name: str, mixture: Experts) -> HFModel:
    raw = config.raw
    for field, only in (("attention_bias", False), ("moe_layer_freq", 1)):
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
    model = describe(config, name, attention, mixture)
    yarn = model.rope.yarn
    if model.rope.llama3_factor or model.rope.linear_factor or (yarn and (yarn.mscale is None or not yarn.truncate)):
        remedy = "latent attention takes the default and yarn with mscale and mscale_all_dim, truncated"
        raise config.refusal("rope_parameters", raw.rope_parameters, remedy)
    return model


_FUSED = {
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj_with_mqa", 1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_PREDICTION_LAYER = (r"model\.layers\.{num_layers}\.",)

DEEPSEEK_V3 = Family(
    "deepseek_v3", ("deepseek_v3", "kimi_k2"), _read_v3, _rules, EngineNames(_FUSED), _PREDICTION_LAYER,
    special="latent attention; sigmoid router with bias and groups, shared expert, dense first layers; block FP8",
)  # fmt: skip
DEEPSEEK_V2 = Family(
    "deepseek_v2", ("deepseek_v2",), _read_v2, _rules, EngineNames(_FUSED),
    special="latent attention; softmax router with groups, shared expert, dense first layers",
)  # fmt: skip
