"""A description of a model: everything that decides its parameters and its forward pass, and nothing else.

A small core that every model has, and parts that are chosen: attention, MLP, norms, rotary embedding. A part knows the
names of its sizes (which weight rules are written in) and its fields of megatron-core's TransformerConfig, as plain
values: `mcore/`, the one room that imports megatron, builds the layers from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from owpo_megatron.families.attention import Attention, DeltaNet, LatentAttention
from owpo_megatron.families.mlp import MLP, Experts
from owpo_megatron.families.rope import Rope

if TYPE_CHECKING:
    from owpo_megatron.families.family import Family
    from owpo_megatron.families.rules import Rule


@dataclass(frozen=True)
class Norms:
    """RMSNorms of a layer: before attention and MLP, on their results before the residual is added, or both."""

    eps: float
    before: bool = True
    after: bool = False
    centred: bool = False  # the weights are differences from 1


@dataclass(frozen=True)
class Multipliers:
    """Constants that some models multiply activations by (Granite)."""

    embedding: float = 1.0  # the embedding's output
    residual: float = 1.0  # what attention and MLP add
    logits: float = 1.0


@dataclass(frozen=True)
class HFModel:
    """A model.

    Example:
        HFModel(family_name="qwen3", num_layers=36, hidden_size=4096, vocab_size=151936, max_positions=32768,
                tied=False, norms=Norms(1e-6), rope=Rope(1e6), mlp=MLP(12288),
                attention=Attention(num_heads=32, num_kv_heads=8, head_dim=128, qk_norm="head"))
    """

    family_name: str
    num_layers: int
    hidden_size: int
    vocab_size: int  # true size, without megatron's padding
    max_positions: int
    tied: bool  # the output layer is the embedding
    attention: Attention | LatentAttention
    mlp: MLP | Experts
    norms: Norms
    rope: Rope
    multipliers: Multipliers = Multipliers()
    local_rope: Rope | None = None  # of the layers with a window; None: they have that of the others
    delta: DeltaNet | None = None  # in place of attention in its layers
    biases: bool = False  # on every linear layer but the output layer: attention's, experts' and router's

    @property
    def family(self) -> Family:
        from owpo_megatron.families.catalogue import family_named

        return family_named(self.family_name)

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The weight rules of this model's family that it needs."""
        return self.family.rules(self)

    @property
    def experts(self) -> Experts | None:
        return self.mlp if isinstance(self.mlp, Experts) else None

    @property
    def num_experts(self) -> int:
        """0 for a dense model."""
        return self.experts.number if self.experts else 0

    @property
    def is_mixed(self) -> bool:
        """True where some layers have experts and others have none."""
        return self.experts is not None and bool(self.experts.dense_layers)

    @property
    def layers_differ(self) -> bool:
        """True where layers have different parameters."""
        return self.is_mixed or self.delta is not None

    def is_linear(self, layer: int) -> bool:
        """Whether a layer has a delta net instead of attention."""
        return self.delta is not None and layer in self.delta.layers

    @property
    def attention_layers(self) -> int:
        """Number of layers with attention."""
        return self.num_layers - (len(self.delta.layers) if self.delta else 0)

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer not in self.experts.dense_layers

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The numbers behind the size names of the rules."""
        own = {"one": 1, "hidden": self.hidden_size, "vocab": self.vocab_size}
        return own | self.attention.sizes | self.mlp.sizes | (self.delta.sizes if self.delta else {})

    def size(self, name: str) -> int:
        return self.sizes[name]

    def megatron_fields(self) -> dict[str, Any]:
        """Return the fields of megatron-core's TransformerConfig that describe the model."""
        fields = dict(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            normalization="RMSNorm",
            layernorm_epsilon=self.norms.eps,
            gated_linear_unit=True,
            add_bias_linear=self.biases,
            rotary_interleaved=self.rope.interleaved,
        )
        if self.norms.centred:
            fields |= dict(layernorm_zero_centered_gamma=True)
        if self.attention.window is not None:
            windowed = [int(self.attention.window_of(layer) is not None) for layer in range(self.num_layers)]
            # megatron counts the tokens before the own one
            fields |= dict(window_size=(self.attention.window - 1, 0), window_attn_skip_freq=windowed)
        if self.layers_differ:
            fields |= dict(moe_layer_freq=[int(self.has_experts(layer)) for layer in range(self.num_layers)])
        if isinstance(self.attention, LatentAttention):
            fields |= self.rope.latent_fields()
        return fields | self.attention.megatron_fields() | self.mlp.megatron_fields()
