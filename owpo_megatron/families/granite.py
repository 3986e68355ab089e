"""Granite 3.x, dense: Llama with constants that multiply embedding, residual branches, scores and logits."""

from __future__ import annotations

from owpo_megatron.families.family import Family
from owpo_megatron.families.llama import rules
from owpo_megatron.families.model import HFModel, Multipliers
from owpo_megatron.families.reading import HFConfig, attention_of, describe, mlp_of


def _read(config: HFConfig) -> HFModel:
    raw = config.raw
    config.require("attention_bias", False)
    attention = attention_of(config, scale=float(raw.attention_multiplier))
    multipliers = Multipliers(
        embedding=float(raw.embedding_multiplier),
        residual=float(raw.residual_multiplier),
        logits=1.0 / float(raw.logits_scaling),
    )
    return describe(config, "granite", attention, mlp_of(config), multipliers=multipliers)


GRANITE = Family("granite", ("granite",), _read, rules, special="multipliers of embedding, residual, scores, logits")
