"""Llama and its close relatives: dense, grouped queries, RMSNorms before attention and MLP.

Llama 2 and 3; Mistral (one with an attention window can be used up to its length, where it is plainly causal); Qwen2
and Qwen2.5 with a bias on queries, keys and values; Qwen3 with a norm on each head's queries and keys.
"""

from __future__ import annotations

from functools import partial

from owpo_megatron.families.attention import Attention
from owpo_megatron.families.family import Family
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.reading import HFConfig, attention_of, describe, mlp_of
from owpo_megatron.families.rules import ATTENTION_OUT, HEAD_NORMS, INPUT_NORM, MLP, OUTER, Rule, mlp_norm, qkv


def attention_rules(model: HFModel) -> tuple[Rule, ...]:
    """Embedding, final norm, head, and everything of a layer but its MLP."""
    assert isinstance(model.attention, Attention)
    bias = (qkv("bias"),) if model.attention.qkv_bias else ()
    norms = HEAD_NORMS if model.attention.qk_norm else ()
    return (*OUTER, INPUT_NORM, qkv(), ATTENTION_OUT, *mlp_norm(), *bias, *norms)


def rules(model: HFModel) -> tuple[Rule, ...]:
    return (*attention_rules(model), *MLP)


def _read(name: str, qkv_bias: bool, qk_norm: bool, config: HFConfig) -> HFModel:
    config.require("attention_bias", False)
    attention = attention_of(config, qkv_bias=qkv_bias, qk_norm="head" if qk_norm else None)
    return describe(config, name, attention, mlp_of(config))


def _variant(name: str, special: str, qkv_bias: bool = False, qk_norm: bool = False) -> Family:
    return Family(name, (name,), partial(_read, name, qkv_bias, qk_norm), rules, special=special)


LLAMA = _variant("llama", "grouped queries; Llama 3's and YaRN's rope scaling")
MISTRAL = _variant("mistral", "sequences up to the attention window")
QWEN2 = _variant("qwen2", "bias on queries, keys and values", qkv_bias=True)
QWEN3 = _variant("qwen3", "a norm on each head's queries and keys; heads of their own size", qk_norm=True)
