"""Mixtral: Mistral's attention, experts in every layer. Its names are of their own: w1 is the gate, w3 up, w2 down."""

from __future__ import annotations

from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.llama import attention_rules
from owpo_megatron.families.mlp import Experts, Router
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.reading import HFConfig, attention_of, describe
from owpo_megatron.families.rules import Rule, experts

_NAMES = ("w1", "w3", "w2")


def _read(config: HFConfig) -> HFModel:
    raw = config.raw
    config.require("hidden_act", "silu")
    if raw.head_dim is not None:
        config.require("head_dim", raw.hidden_size // raw.num_attention_heads)  # as SGLang computes it
    router = Router(raw.num_experts_per_tok)
    mlp = Experts(raw.num_local_experts, raw.intermediate_size, router)
    return describe(config, "mixtral", attention_of(config), mlp)


def _rules(model: HFModel) -> tuple[Rule, ...]:
    own = experts("block_sparse_moe.experts.{expert}.", "block_sparse_moe.gate.weight", _NAMES)
    return (*attention_rules(model), *own)


_ENGINE = EngineNames(expert=_NAMES, ties=False)
MIXTRAL = Family("mixtral", ("mixtral",), _read, _rules, _ENGINE, special="experts in every layer; names of their own")
