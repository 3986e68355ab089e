"""OLMo-2: norms on the results of attention and MLP alone, and on all heads' queries and keys together."""

from __future__ import annotations

from owpo_megatron.families.family import Family
from owpo_megatron.families.model import HFModel, Norms
from owpo_megatron.families.reading import HFConfig, attention_of, describe, mlp_of
from owpo_megatron.families.rules import ALL_HEADS_NORMS, ATTENTION_OUT, MLP, OUTER, Rule, norms_after, qkv


def _read(config: HFConfig) -> HFModel:
    config.require("attention_bias", False)
    norms = Norms(config.raw.rms_norm_eps, before=False, after=True)
    return describe(config, "olmo2", attention_of(config, qk_norm="all"), mlp_of(config), norms)


def _rules(model: HFModel) -> tuple[Rule, ...]:
    after = norms_after("post_attention_layernorm", "post_feedforward_layernorm")
    return (*OUTER, qkv(), ATTENTION_OUT, *ALL_HEADS_NORMS, *after, *MLP)


OLMO2 = Family("olmo2", ("olmo2",), _read, _rules, special="norms after, none before; a norm over all heads")
