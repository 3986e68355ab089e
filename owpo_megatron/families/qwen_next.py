"""Qwen3-Next: gated delta nets in three of four layers, gated attention in the others, experts with a gated shared one.

Norms have weights around zero, but for the one inside the delta net.
"""

from __future__ import annotations

from dataclasses import replace

from owpo_megatron.families.attention import DeltaNet
from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.model import HFModel, Norms
from owpo_megatron.families.qwen_moe import gated_experts, gated_experts_rules
from owpo_megatron.families.reading import HFConfig, attention_of, describe
from owpo_megatron.families.rope import read_rope
from owpo_megatron.families.rules import (
    ATTENTION_OUT,
    HEAD_NORMS,
    HF,
    INPUT_NORM,
    MEGATRON,
    OUTER,
    Part,
    Rule,
    mlp_norm,
    qkv,
)

_DELTA: dict[str, tuple[str, ...]] = {
    "in_proj_qkvz.weight": ("delta_qkvz", "hidden"),
    "in_proj_ba.weight": ("delta_ba", "hidden"),
    "conv1d.weight": ("delta_conv", "one", "delta_kernel"),
    "dt_bias": ("delta_heads",),
    "A_log": ("delta_heads",),
    "norm.weight": ("delta_head",),
    "out_proj.weight": ("hidden", "delta_v"),
}


def _read(config: HFConfig) -> HFModel:
    raw = config.raw
    config.require("attention_bias", False)
    delta = DeltaNet(
        key_heads=raw.linear_num_key_heads,
        value_heads=raw.linear_num_value_heads,
        key_dim=raw.linear_key_head_dim,
        value_dim=raw.linear_value_head_dim,
        kernel=raw.linear_conv_kernel_dim,
        layers=tuple(layer for layer, kind in enumerate(raw.layer_types) if kind == "linear_attention"),
    )
    attention = attention_of(config, qk_norm="head", gated=True)
    norms, rope = Norms(raw.rms_norm_eps, centred=True), read_rope(config.path, raw, partial=True)
    return replace(describe(config, "qwen3_next", attention, gated_experts(config), norms, rope), delta=delta)


def _rules(model: HFModel) -> tuple[Rule, ...]:
    norm = (Part(HF + "input_layernorm.weight", ("hidden",)),)
    gated = qkv()
    gated = replace(gated, hf=(replace(gated.hf[0], shape=("gated_q", "hidden")), *gated.hf[1:]), fuse="gated_qkv")
    full = (INPUT_NORM, gated, ATTENTION_OUT, *HEAD_NORMS)
    linear = [
        Rule((f"{MEGATRON}self_attention.{name}",), (Part(f"{HF}linear_attn.{name}", shape),), layers="linear")
        for name, shape in _DELTA.items()
    ]
    return (
        *OUTER,
        *(replace(rule, layers="full") for rule in full),
        Rule((MEGATRON + "input_layernorm.weight",), norm, layers="linear"),
        *linear,
        *mlp_norm(),
        *gated_experts_rules(),
    )


QWEN3_NEXT = Family(
    "qwen3_next", ("qwen3_next",), _read, _rules, EngineNames(ties=False), (r"mtp\.",),
    special="gated delta nets and gated attention in turn, norms around zero; experts and a gated shared one",
)  # fmt: skip
