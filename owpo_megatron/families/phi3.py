"""Phi-3, Phi-3.5 and Phi-4 with the plain rotary embedding (4k variants, Phi-4 14B): Llama with fused HF tensors."""

from __future__ import annotations

from owpo_megatron.families.family import Family
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.reading import HFConfig, attention_of, describe, mlp_of
from owpo_megatron.families.rope import read_rope
from owpo_megatron.families.rules import ATTENTION_OUT, FUSED_MLP, FUSED_QKV, INPUT_NORM, OUTER, Rule, mlp_norm


def _read(config: HFConfig) -> HFModel:
    rope = read_rope(config.path, config.raw, partial=True)
    return describe(config, "phi3", attention_of(config), mlp_of(config), rope=rope)


def _rules(model: HFModel) -> tuple[Rule, ...]:
    return (*OUTER, INPUT_NORM, FUSED_QKV, ATTENTION_OUT, *mlp_norm(), *FUSED_MLP)


PHI3 = Family("phi3", ("phi3",), _read, _rules, special="fused projections; partial rotary embedding")
