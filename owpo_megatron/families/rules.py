"""How weights of megatron-core and of an HF checkpoint correspond: declarative rules, and those of all dense families.

Sizes are named, so one table serves every model of a family:
    hidden, ffn, vocab, head (one head's size), q (heads * head), kv (key-value heads * head),
    experts (how many), expert_ffn
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = Literal["hidden", "ffn", "vocab", "head", "q", "kv", "experts", "expert_ffn"]


@dataclass(frozen=True)
class Part:
    """One tensor of the HF checkpoint; `{layer}` and `{expert}` in its name are indices in the whole model."""

    name: str
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class Rule:
    """One megatron parameter and the HF tensors that it is made of.

    fuse:
        plain: the tensor itself.
        qkv: for each query group its query heads, its key head, its value head.
        gate_up: a TP rank holds its rows of the gate, then its rows of the up projection (chunking the concatenation
            of the full tensors would give the first rank gates only).
    tp_dim: the dimension that is split over tensor-parallel ranks, of every part alike; None: replicated.
    stored: the name in a sharded checkpoint, where layers (and experts) are leading dimensions of one tensor; None:
        the last megatron name without its indices.

    A rule whose names hold `{expert}` is of parameters that are spread over expert-parallel ranks, whole experts each.
    """

    megatron: tuple[str, ...]  # equivalent names: of the local spec, then of the Transformer Engine spec
    hf: tuple[Part, ...]
    fuse: Literal["plain", "qkv", "gate_up"] = "plain"
    tp_dim: int | None = None
    stored: str | None = None

    @property
    def stored_name(self) -> str:
        return self.stored or self.megatron[-1].replace("{layer}.", "")

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron[0]


@dataclass(frozen=True)
class Family:
    """Models whose checkpoints share one table."""

    name: str
    model_types: tuple[str, ...]  # config.json's model_type
    rules: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False  # every layer's MLP is a mixture of experts


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LM_HEAD = "lm_head.weight"

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

_OUTER_RULES = (
    Rule((EMBEDDING,), (Part("model.embed_tokens.weight", ("vocab", "hidden")),), tp_dim=0),
    Rule(("decoder.final_layernorm.weight",), (Part("model.norm.weight", ("hidden",)),)),
    Rule((OUTPUT_LAYER,), (Part(LM_HEAD, ("vocab", "hidden")),), tp_dim=0),
)

_ATTENTION_RULES = (
    Rule(
        (_MEGATRON + "input_layernorm.weight", _MEGATRON + "self_attention.linear_qkv.layer_norm_weight"),
        (Part(_HF + "input_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        (_MEGATRON + "self_attention.linear_qkv.weight",),
        (
            Part(_HF + "self_attn.q_proj.weight", ("q", "hidden")),
            Part(_HF + "self_attn.k_proj.weight", ("kv", "hidden")),
            Part(_HF + "self_attn.v_proj.weight", ("kv", "hidden")),
        ),
        fuse="qkv",
        tp_dim=0,
    ),
    Rule(
        (_MEGATRON + "self_attention.linear_proj.weight",),
        (Part(_HF + "self_attn.o_proj.weight", ("hidden", "q")),),
        tp_dim=1,
    ),
)

_MLP_RULES = (
    Rule(
        (_MEGATRON + "pre_mlp_layernorm.weight", _MEGATRON + "mlp.linear_fc1.layer_norm_weight"),
        (Part(_HF + "post_attention_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        (_MEGATRON + "mlp.linear_fc1.weight",),
        (
            Part(_HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
            Part(_HF + "mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        fuse="gate_up",
        tp_dim=0,
    ),
    Rule(
        (_MEGATRON + "mlp.linear_fc2.weight",),
        (Part(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),),
        tp_dim=1,
    ),
)

_EXPERT = "mlp.experts.local_experts.{expert}."  # of SequentialMLP; grouped GEMMs number the weights themselves

_EXPERT_RULES = (
    Rule(
        (_MEGATRON + "pre_mlp_layernorm.weight",),
        (Part(_HF + "post_attention_layernorm.weight", ("hidden",)),),
    ),
    Rule(
        (_MEGATRON + "mlp.router.weight",),
        (Part(_HF + "mlp.gate.weight", ("experts", "hidden")),),
    ),
    Rule(
        (_MEGATRON + _EXPERT + "linear_fc1.weight", _MEGATRON + "mlp.experts.linear_fc1.weight{expert}"),
        (
            Part(_HF + "mlp.experts.{expert}.gate_proj.weight", ("expert_ffn", "hidden")),
            Part(_HF + "mlp.experts.{expert}.up_proj.weight", ("expert_ffn", "hidden")),
        ),
        fuse="gate_up",
        tp_dim=0,
        stored="decoder.layers.mlp.experts.experts.linear_fc1.weight",
    ),
    Rule(
        (_MEGATRON + _EXPERT + "linear_fc2.weight", _MEGATRON + "mlp.experts.linear_fc2.weight{expert}"),
        (Part(_HF + "mlp.experts.{expert}.down_proj.weight", ("hidden", "expert_ffn")),),
        tp_dim=1,
        stored="decoder.layers.mlp.experts.experts.linear_fc2.weight",
    ),
)

DENSE_RULES = (*_OUTER_RULES, *_ATTENTION_RULES, *_MLP_RULES)
MOE_RULES = (*_OUTER_RULES, *_ATTENTION_RULES, *_EXPERT_RULES)

QKV_BIAS_RULE = Rule(
    (_MEGATRON + "self_attention.linear_qkv.bias",),
    (
        Part(_HF + "self_attn.q_proj.bias", ("q",)),
        Part(_HF + "self_attn.k_proj.bias", ("kv",)),
        Part(_HF + "self_attn.v_proj.bias", ("kv",)),
    ),
    fuse="qkv",
    tp_dim=0,
)

QK_NORM_RULES = (
    Rule(
        (_MEGATRON + "self_attention.q_layernorm.weight",),
        (Part(_HF + "self_attn.q_norm.weight", ("head",)),),
    ),
    Rule(
        (_MEGATRON + "self_attention.k_layernorm.weight",),
        (Part(_HF + "self_attn.k_norm.weight", ("head",)),),
    ),
)
