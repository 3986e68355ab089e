"""How weights of megatron-core and of an HF checkpoint correspond: declarative rules, and those of all dense families.

Sizes are named, so one table serves every model of a family:
    hidden, ffn, vocab, head (one head's size), q (heads * head), kv (key-value heads * head)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = Literal["hidden", "ffn", "vocab", "head", "q", "kv"]


@dataclass(frozen=True)
class Part:
    """One tensor of the HF checkpoint; `{layer}` in its name is the layer's index in the whole model."""

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
    """

    megatron: tuple[str, ...]  # equivalent names: of the local spec, then of the Transformer Engine spec
    hf: tuple[Part, ...]
    fuse: Literal["plain", "qkv", "gate_up"] = "plain"
    tp_dim: int | None = None


@dataclass(frozen=True)
class Family:
    """Models whose checkpoints share one table."""

    name: str
    model_types: tuple[str, ...]  # config.json's model_type
    rules: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
LM_HEAD = "lm_head.weight"

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

DENSE_RULES = (
    Rule((EMBEDDING,), (Part("model.embed_tokens.weight", ("vocab", "hidden")),), tp_dim=0),
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
    Rule(("decoder.final_layernorm.weight",), (Part("model.norm.weight", ("hidden",)),)),
    Rule((OUTPUT_LAYER,), (Part(LM_HEAD, ("vocab", "hidden")),), tp_dim=0),
)

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
