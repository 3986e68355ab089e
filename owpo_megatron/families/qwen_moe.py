"""Qwen's mixtures of experts.

Qwen3 (30B-A3B, 235B-A22B): Qwen3's attention and a router. Qwen1.5 and Qwen2: Qwen2's attention, and besides the
chosen experts a shared one whose answer a gate scales.
"""

from __future__ import annotations

from dataclasses import replace

from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.llama import attention_rules
from owpo_megatron.families.mlp import Experts, Router, SharedExpert
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.reading import HFConfig, attention_of, describe
from owpo_megatron.families.rules import HF, MEGATRON, Part, Rule, experts, shared_expert

_GATE = Rule(
    (MEGATRON + "mlp.shared_experts.gate_weight",),
    (Part(HF + "mlp.shared_expert_gate.weight", ("one", "hidden")),),
    layers="experts",
)


def _read_qwen3(config: HFConfig) -> HFModel:
    config.require("attention_bias", False)
    return describe(config, "qwen3_moe", attention_of(config, qk_norm="head"), _experts(config))


def _read_qwen2(config: HFConfig) -> HFModel:
    attention = attention_of(config, qkv_bias=bool(config.get("qkv_bias", True)))
    return describe(config, "qwen2_moe", attention, gated_experts(config))


def gated_experts(config: HFConfig) -> Experts:
    """Experts in every layer, and a shared one with a gate."""
    shared = SharedExpert(config.raw.shared_expert_intermediate_size, gated=True)
    return replace(_experts(config), shared=shared)


def gated_experts_rules() -> tuple[Rule, ...]:
    return (*experts(), *shared_expert("mlp.shared_expert"), _GATE)


def _experts(config: HFConfig) -> Experts:
    raw = config.raw
    config.require("hidden_act", "silu")
    dense = config.get("mlp_only_layers"), config.get("decoder_sparse_step", 1)
    if dense[0] or dense[1] != 1:
        remedy = "not supported; only experts in every layer are ([] and 1), as in SGLang"
        raise config.refusal("mlp_only_layers, decoder_sparse_step", dense, remedy)
    router = Router(raw.num_experts_per_tok, normalised=config.get("norm_topk_prob", True))
    return Experts(raw.num_experts, raw.moe_intermediate_size, router)


def _rules(model: HFModel) -> tuple[Rule, ...]:
    shared = model.experts and model.experts.shared
    return (*attention_rules(model), *(gated_experts_rules() if shared else experts()))


_ENGINE = EngineNames(ties=False)
QWEN3_MOE = Family("qwen3_moe", ("qwen3_moe",), _read_qwen3, _rules, _ENGINE, special="experts in every layer")
QWEN2_MOE = Family("qwen2_moe", ("qwen2_moe",), _read_qwen2, _rules, _ENGINE, special="experts and a gated shared one")
