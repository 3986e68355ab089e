"""Qwen's mixtures of experts.

Qwen3 with experts in every layer (30B-A3B, 235B-A22B): Qwen3's attention, a router, no shared expert.
"""

from __future__ import annotations

from owpo_megatron.families.family import Family
from owpo_megatron.families.llama import attention_rules
from owpo_megatron.families.model import Experts, HFModel, Router
from owpo_megatron.families.reading import HFConfig, attention_of, describe
from owpo_megatron.families.rules import Rule, experts


def _read_qwen3(config: HFConfig) -> HFModel:
    config.require("attention_bias", False)
    config.require("hidden_act", "silu")
    return describe(config, "qwen3_moe", attention_of(config, qk_norm="head"), _experts(config))


def _experts(config: HFConfig) -> Experts:
    raw = config.raw
    if raw.mlp_only_layers or raw.decoder_sparse_step != 1:
        raise config.refusal(
            "mlp_only_layers, decoder_sparse_step",
            (raw.mlp_only_layers, raw.decoder_sparse_step),
            "not supported; only experts in every layer are ([] and 1)",
        )
    router = Router(raw.num_experts_per_tok, normalised=raw.norm_topk_prob)
    return Experts(raw.num_experts, raw.moe_intermediate_size, router)


def _rules(model: HFModel) -> tuple[Rule, ...]:
    return (*attention_rules(model), *experts())


QWEN3_MOE = Family("qwen3_moe", ("qwen3_moe",), _read_qwen3, _rules, special="experts in every layer")
