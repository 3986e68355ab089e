"""Qwen3-Next and Qwen3.5's text models: gated delta nets in three of four layers, gated attention in the others.

Norms have weights around zero, but for the one inside the delta net. Qwen3-Next and Qwen3.5-MoE have experts with a
gated shared one. Qwen3.5's checkpoints hold the delta net's projections apart, which Qwen3-Next's fuse by key heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from owpo_megatron.families.attention import DeltaNet
from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.mlp import MLP, Experts
from owpo_megatron.families.model import HFModel, Norms
from owpo_megatron.families.qwen_moe import gated_experts, gated_experts_rules
from owpo_megatron.families.reading import HFConfig, attention_of, describe, mlp_of
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
from owpo_megatron.families.rules import MLP as MLP_RULES

_OWN, _NET = MEGATRON + "self_attention.", HF + "linear_attn."
_PLAIN: dict[str, tuple[str, ...]] = {
    "conv1d.weight": ("delta_conv", "one", "delta_kernel"),
    "dt_bias": ("delta_heads",),
    "A_log": ("delta_heads",),
    "norm.weight": ("delta_head",),
    "out_proj.weight": ("hidden", "delta_v"),
}
_FUSED: dict[str, tuple[str, ...]] = {
    "in_proj_qkvz.weight": ("delta_qkvz", "hidden"),
    "in_proj_ba.weight": ("delta_ba", "hidden"),
}


def _tensors(names: dict[str, tuple[str, ...]]) -> tuple[Rule, ...]:
    """Rules of tensors that are the same on both sides."""
    return tuple(Rule((_OWN + name,), (Part(_NET + name, shape),), layers="linear") for name, shape in names.items())


def _apart(name: str, *parts: Part) -> Rule:
    return Rule((_OWN + name,), parts, fuse="groups", groups="delta_groups", layers="linear")


_QKV, _KEYS = _NET + "in_proj_qkv.weight", ("delta_k", "hidden")
_APART = (
    _apart(
        "in_proj_qkvz.weight",
        Part(_QKV, _KEYS),
        Part(_QKV, _KEYS, behind=("delta_k",)),
        Part(_QKV, ("delta_v", "hidden"), behind=("delta_k", "delta_k")),
        Part(_NET + "in_proj_z.weight", ("delta_v", "hidden")),
    ),
    _apart("in_proj_ba.weight", *(Part(f"{_NET}in_proj_{x}.weight", ("delta_heads", "hidden")) for x in ("b", "a"))),
)


def _read(name: str, mlp: Callable[[HFConfig], MLP | Experts], config: HFConfig) -> HFModel:
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
    return replace(describe(config, name, attention, mlp(config), norms, rope), delta=delta)


def _rules(projections: tuple[Rule, ...], model: HFModel) -> tuple[Rule, ...]:
    norm = (Part(HF + "input_layernorm.weight", ("hidden",)),)
    gated = qkv()
    gated = replace(gated, hf=(replace(gated.hf[0], shape=("gated_q", "hidden")), *gated.hf[1:]), fuse="gated_groups")
    full = (INPUT_NORM, gated, ATTENTION_OUT, *HEAD_NORMS)
    return (
        *OUTER,
        *(replace(rule, layers="full") for rule in full),
        Rule((MEGATRON + "input_layernorm.weight",), norm, layers="linear"),
        *projections,
        *_tensors(_PLAIN),
        *mlp_norm(),
        *(gated_experts_rules() if model.experts else MLP_RULES),
    )


def _family(name: str, mlp: Callable[[HFConfig], MLP | Experts], projections: tuple[Rule, ...], special: str) -> Family:
    read, rules = partial(_read, name, mlp), partial(_rules, projections)
    return Family(name, (name,), read, rules, EngineNames(ties=False), (r"mtp\.",), special)


_SPECIAL = "gated delta nets and gated attention in turn, norms around zero"
_EXPERTS = "; experts and a gated shared one"
QWEN3_NEXT = _family("qwen3_next", gated_experts, _tensors(_FUSED), _SPECIAL + _EXPERTS)
QWEN3_5 = _family("qwen3_5_text", mlp_of, _APART, _SPECIAL)
QWEN3_5_MOE = _family("qwen3_5_moe_text", gated_experts, _APART, _SPECIAL + _EXPERTS)
