"""gpt-oss: attention sinks, windowed and full layers in turn, biases, and experts with a clamped activation.

All experts of a layer are in one tensor, multiplied from the right; rows of gate and up projection alternate. The
weights are published in MXFP4 and are dequantised when they are read (`forms`).
"""

from __future__ import annotations

from dataclasses import replace

from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.llama import attention_rules
from owpo_megatron.families.mlp import Experts, Router
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.reading import HFConfig, attention_of, describe
from owpo_megatron.families.rules import ATTENTION_OUT, HF, MEGATRON, Part, Rule, experts


def _read(config: HFConfig) -> HFModel:
    raw = config.raw
    config.require("attention_bias", True)
    config.require("hidden_act", "silu")
    config.require("swiglu_limit", 7.0)  # built into transformers
    attention = attention_of(config, qkv_bias=True, sinks=True)
    router = Router(raw.num_experts_per_tok)
    mlp = Experts(raw.num_local_experts, raw.intermediate_size, router, activation="clamped_swiglu")
    return replace(describe(config, "gpt_oss", attention, mlp), biases=True)


_SINKS = Rule(
    (MEGATRON + "self_attention.core_attention.softmax_offset",), (Part(HF + "self_attn.sinks", ("heads",)),), tp_dim=0
)
_BIASES = (
    replace(
        ATTENTION_OUT,
        megatron=(MEGATRON + "self_attention.linear_proj.bias",),
        hf=(Part(HF + "self_attn.o_proj.bias", ("hidden",)),),
        tp_dim=None,
    ),
    Rule((MEGATRON + "mlp.router.bias",), (Part(HF + "mlp.router.bias", ("experts",)),)),
)


def _experts() -> tuple[Rule, ...]:
    """Those of every mixture, from this family's tensors, and the same for the biases."""
    router, gate_up, down = experts(router="mlp.router.weight")
    stem = HF + "mlp.experts.{expert}."
    gate_up = replace(
        gate_up, hf=(Part(stem + "gate_up_proj", ("hidden", "expert_ffns"), transposed=True),), fuse="pairs"
    )
    down = replace(down, hf=(Part(stem + "down_proj", ("expert_ffn", "hidden"), transposed=True),))
    return (
        *(router, gate_up, down),
        _bias_of(gate_up, Part(stem + "gate_up_proj_bias", ("expert_ffns",)), tp_dim=0),
        _bias_of(down, Part(stem + "down_proj_bias", ("hidden",)), tp_dim=None),
    )


def _bias_of(rule: Rule, part: Part, tp_dim: int | None) -> Rule:
    assert rule.stored is not None
    names = tuple(name.replace(".weight", ".bias") for name in rule.megatron)
    return replace(rule, megatron=names, hf=(part,), tp_dim=tp_dim, stored=rule.stored.replace(".weight", ".bias"))


def _rules(model: HFModel) -> tuple[Rule, ...]:
    return (*attention_rules(model), _SINKS, *_BIASES, *_experts())


GPT_OSS = Family(
    "gpt_oss", ("gpt_oss",), _read, _rules, EngineNames(ties=False, windows=True),
    special="attention sinks, windows in every other layer, biases, clamped activation; MXFP4",
)  # fmt: skip
