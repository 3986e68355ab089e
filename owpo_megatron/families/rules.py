"""Declarative rules that map weights of megatron-core to those of an HF checkpoint, and the rules families share.

Sizes are named, so that one rule serves every model: hidden, vocab, and the names that the parts of a model define
(`attention.Attention.sizes` and so on): head (of one head), q (heads * head), kv (key-value heads * head), ffn, experts
(how many), expert_ffn, expert_ffns (gate and up together), shared_ffn, heads and kv_heads (how many).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fuse = Literal["plain", "groups", "gated_groups", "gate_up", "pairs"]


@dataclass(frozen=True)
class Part:
    """One tensor of the HF checkpoint, or some of its rows.

    Args:
        name: `{layer}` and `{expert}` in it are indices in the whole model.
        shape: names of the sizes.
        behind: sizes of what the HF tensor holds before these rows, where it holds several parts one after another
            (Phi-3's qkv_proj: queries, keys, values). Parts of one tensor are in its order.
        transposed: the HF matrix is multiplied from the right: its columns are megatron's rows.
    """

    name: str
    shape: tuple[str, ...]
    behind: tuple[str, ...] = ()
    transposed: bool = False

    def dim(self, megatron_dim: int) -> int:
        """The HF tensor's dimension that is megatron's `megatron_dim`."""
        return 1 - megatron_dim if self.transposed else megatron_dim


@dataclass(frozen=True)
class Rule:
    """One megatron parameter and the HF tensors that it is made of.

    A rule whose names hold `{expert}` is about parameters that are spread over expert-parallel ranks, whole experts
    each.

    Args:
        megatron: equivalent names: of the local layers, then of Transformer Engine's.
        fuse:
            plain: the tensor itself.
            groups: group by group, each with its rows of every part: of a query group its query heads, its key head,
                its value head.
            gated_groups: the same where each query head is followed by its gate: a group's gates come behind its
                queries.
            gate_up: a TP rank holds its rows of the gate, then its rows of the up projection (chunking the
                concatenation of the full tensors would give the first rank gates only).
            pairs: the same from one HF tensor in which rows (or columns) of gate and up projection alternate.
        tp_dim: megatron's dimension that is split over tensor-parallel ranks, of every part alike; None: replicated.
        stored: the name in a sharded checkpoint, where layers (and experts) are leading dimensions of one tensor;
            None: the last megatron name without its indices.
        layers: which layers have the parameter, in a model where some have experts and others have none, or some
            linear and others full attention.
        float32: kept in float32 whatever the model's dtype, on both sides.
        groups: size name of the number of groups.
    """

    megatron: tuple[str, ...]
    hf: tuple[Part, ...]
    fuse: Fuse = "plain"
    tp_dim: int | None = None
    stored: str | None = None
    layers: Literal["all", "dense", "experts", "linear", "full"] = "all"
    float32: bool = False
    groups: str = "kv_heads"

    @property
    def stored_name(self) -> str:
        """Name in a sharded checkpoint, with `{layer}` if the layers of a model differ; see `weights.place_of`."""
        return self.stored or self.megatron[-1].replace("{layer}.", "")

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron[0]

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron[0]


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

MEGATRON = "decoder.layers.{layer}."
HF = "model.layers.{layer}."
_EXPERT = "mlp.experts.local_experts.{expert}."  # of SequentialMLP; grouped GEMMs number the weights themselves

OUTER = (
    Rule((EMBEDDING,), (Part(HF_EMBEDDING, ("vocab", "hidden")),), tp_dim=0),
    Rule(("decoder.final_layernorm.weight",), (Part(HF_FINAL_NORM, ("hidden",)),)),
    Rule((OUTPUT_LAYER,), (Part(LM_HEAD, ("vocab", "hidden")),), tp_dim=0),
)

INPUT_NORM = Rule(
    (MEGATRON + "input_layernorm.weight", MEGATRON + "self_attention.linear_qkv.layer_norm_weight"),
    (Part(HF + "input_layernorm.weight", ("hidden",)),),
)


def qkv(kind: str = "weight") -> Rule:
    """Queries, keys and values, each a tensor of its own in the HF checkpoint."""
    columns = ("hidden",) if kind == "weight" else ()
    names = (("q_proj", "q"), ("k_proj", "kv"), ("v_proj", "kv"))
    return Rule(
        (MEGATRON + f"self_attention.linear_qkv.{kind}",),
        tuple(Part(HF + f"self_attn.{name}.{kind}", (rows, *columns)) for name, rows in names),
        fuse="groups",
        tp_dim=0,
    )


ATTENTION_OUT = Rule(
    (MEGATRON + "self_attention.linear_proj.weight",),
    (Part(HF + "self_attn.o_proj.weight", ("hidden", "q")),),
    tp_dim=1,
)
HEAD_NORMS = tuple(
    Rule((MEGATRON + f"self_attention.{x}_layernorm.weight",), (Part(HF + f"self_attn.{x}_norm.weight", ("head",)),))
    for x in "qk"
)
ALL_HEADS_NORMS = tuple(
    Rule(
        (MEGATRON + f"self_attention.{x}_layernorm.weight",),
        (Part(HF + f"self_attn.{x}_norm.weight", (rows,)),),
        tp_dim=0,
    )
    for x, rows in (("q", "q"), ("k", "kv"))
)
# queries, keys and values in one HF tensor
FUSED_QKV = Rule(
    (MEGATRON + "self_attention.linear_qkv.weight",),
    tuple(
        Part(HF + "self_attn.qkv_proj.weight", (rows, "hidden"), behind)
        for rows, behind in (("q", ()), ("kv", ("q",)), ("kv", ("q", "kv")))
    ),
    fuse="groups",
    tp_dim=0,
)


def norms_after(attention: str, mlp: str) -> tuple[Rule, ...]:
    """The norms on the results of attention and MLP, by their HF names."""
    return tuple(
        Rule((MEGATRON + f"{own}.weight",), (Part(HF + f"{name}.weight", ("hidden",)),))
        for own, name in (("post_attention_layernorm", attention), ("post_mlp_layernorm", mlp))
    )


def mlp_norm(hf: str = "post_attention_layernorm") -> tuple[Rule, ...]:
    """The norm before the MLP. Where there are no experts Transformer Engine fuses it into the first projection."""
    own, fused = MEGATRON + "pre_mlp_layernorm.weight", MEGATRON + "mlp.linear_fc1.layer_norm_weight"
    parts = (Part(HF + f"{hf}.weight", ("hidden",)),)
    return Rule((own, fused), parts, layers="dense"), Rule((own,), parts, layers="experts")


def _mlp(gate: Part, up: Part) -> tuple[Rule, ...]:
    down = Part(HF + "mlp.down_proj.weight", ("hidden", "ffn"))
    return (
        Rule((MEGATRON + "mlp.linear_fc1.weight",), (gate, up), fuse="gate_up", tp_dim=0, layers="dense"),
        Rule((MEGATRON + "mlp.linear_fc2.weight",), (down,), tp_dim=1, layers="dense"),
    )


MLP = _mlp(
    Part(HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
    Part(HF + "mlp.up_proj.weight", ("ffn", "hidden")),
)
# gate and up projection in one HF tensor
FUSED_MLP = _mlp(
    Part(HF + "mlp.gate_up_proj.weight", ("ffn", "hidden")),
    Part(HF + "mlp.gate_up_proj.weight", ("ffn", "hidden"), ("ffn",)),
)
ROUTER_BIAS = Rule(
    (MEGATRON + "mlp.router.expert_bias",),
    (Part(HF + "mlp.gate.e_score_correction_bias", ("experts",)),),
    layers="experts",
    float32=True,
)


def experts(
    stem: str = "mlp.experts.{expert}.",
    router: str = "mlp.gate.weight",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Rule, ...]:
    """The router and every expert's gated MLP.

    Args:
        stem: the HF name of one expert, without the layer's.
        names: gate, up and down projection.
    """
    gate, up, down = (HF + stem + name + ".weight" for name in names)
    return (
        Rule((MEGATRON + "mlp.router.weight",), (Part(HF + router, ("experts", "hidden")),), layers="experts"),
        Rule(
            (MEGATRON + _EXPERT + "linear_fc1.weight", MEGATRON + "mlp.experts.linear_fc1.weight{expert}"),
            (Part(gate, ("expert_ffn", "hidden")), Part(up, ("expert_ffn", "hidden"))),
            fuse="gate_up",
            tp_dim=0,
            stored="decoder.layers.mlp.experts.experts.linear_fc1.weight",
            layers="experts",
        ),
        Rule(
            (MEGATRON + _EXPERT + "linear_fc2.weight", MEGATRON + "mlp.experts.linear_fc2.weight{expert}"),
            (Part(down, ("hidden", "expert_ffn")),),
            tp_dim=1,
            stored="decoder.layers.mlp.experts.experts.linear_fc2.weight",
            layers="experts",
        ),
    )


def shared_expert(stem: str) -> tuple[Rule, ...]:
    """The MLP that every token goes to, under the HF name `stem`."""
    halves = tuple(Part(HF + f"{stem}.{half}_proj.weight", ("shared_ffn", "hidden")) for half in ("gate", "up"))
    own = MEGATRON + "mlp.shared_experts."
    down = (Part(HF + f"{stem}.down_proj.weight", ("hidden", "shared_ffn")),)
    return (
        Rule((own + "linear_fc1.weight",), halves, fuse="gate_up", tp_dim=0, layers="experts"),
        Rule((own + "linear_fc2.weight",), down, tp_dim=1, layers="experts"),
    )
