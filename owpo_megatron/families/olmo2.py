"""OLMo-2 and 3: norms on the results of attention and MLP alone, and on all heads' queries and keys together.

OLMo-3 has windows in three of four layers.
"""

from __future__ import annotations

from dataclasses import replace

from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.model import HFModel, Norms
from owpo_megatron.families.reading import HFConfig, attention_of, describe, mlp_of
from owpo_megatron.families.rope import Rope
from owpo_megatron.families.rules import ALL_HEADS_NORMS, ATTENTION_OUT, MLP, OUTER, Rule, norms_after, qkv


def _read(config: HFConfig) -> HFModel:
    config.require("attention_bias", False)
    norms = Norms(config.raw.rms_norm_eps, before=False, after=True)
    name = config.raw.model_type
    return describe(config, name, attention_of(config, qk_norm="all"), mlp_of(config), norms)


def _read_3(config: HFConfig) -> HFModel:
    """Read it as OLMo-2; a rope scaling is for the layers without a window alone."""
    model = _read(config)
    plain = Rope(model.rope.theta)
    return model if model.rope == plain else replace(model, local_rope=plain)


def _rules(model: HFModel) -> tuple[Rule, ...]:
    after = norms_after("post_attention_layernorm", "post_feedforward_layernorm")
    return (*OUTER, qkv(), ATTENTION_OUT, *ALL_HEADS_NORMS, *after, *MLP)


OLMO2 = Family("olmo2", ("olmo2",), _read, _rules, special="norms after, none before; a norm over all heads")
OLMO3 = Family(
    "olmo3", ("olmo3",), _read_3, _rules, EngineNames(windows=True),
    special="as OLMo-2, with windows in three of four layers",
)  # fmt: skip
