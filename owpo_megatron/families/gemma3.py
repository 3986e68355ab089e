"""Gemma-3, text: norms before and after with weights around zero, windows in most layers and a rotary embedding of
their own, embeddings multiplied by the root of their size, gelu."""

from __future__ import annotations

import math

from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.mlp import MLP
from owpo_megatron.families.model import HFModel, Multipliers, Norms
from owpo_megatron.families.reading import HFConfig, attention_of, describe
from owpo_megatron.families.rope import rope_of
from owpo_megatron.families.rules import ATTENTION_OUT, HEAD_NORMS, INPUT_NORM, OUTER, Rule, mlp_norm, norms_after, qkv
from owpo_megatron.families.rules import MLP as MLP_RULES


def _read(config: HFConfig) -> HFModel:
    raw = config.raw
    config.require("attention_bias", False)
    config.require("hidden_activation", "gelu_pytorch_tanh")
    for field in ("final_logit_softcapping", "attn_logit_softcapping"):
        config.require(field, None)
    config.require("use_bidirectional_attention", False)
    full = tuple(layer for layer, kind in enumerate(raw.layer_types) if kind == "full_attention")
    attention = attention_of(
        config, qk_norm="head", scale=raw.query_pre_attn_scalar**-0.5, window=raw.sliding_window, full_layers=full
    )
    ropes = {kind: rope_of(config.path, parameters) for kind, parameters in raw.rope_parameters.items()}
    return describe(
        config,
        "gemma3_text",
        attention,
        MLP(raw.intermediate_size, "gelu_tanh"),
        Norms(raw.rms_norm_eps, after=True, centred=True),
        ropes["full_attention"],
        Multipliers(embedding=math.sqrt(raw.hidden_size)),
        ropes["sliding_attention"],
    )


def _rules(model: HFModel) -> tuple[Rule, ...]:
    after = norms_after("post_attention_layernorm", "post_feedforward_layernorm")
    attention = (INPUT_NORM, qkv(), ATTENTION_OUT, *HEAD_NORMS)
    return (*OUTER, *attention, *mlp_norm("pre_feedforward_layernorm"), *after, *MLP_RULES)


GEMMA3 = Family(
    "gemma3_text", ("gemma3_text",), _read, _rules, EngineNames(windows=True),
    special="norms before and after, around zero; windows with a rotary embedding of their own; gelu",
)  # fmt: skip
