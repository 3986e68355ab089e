"""A description of a model: everything that decides its parameters and its forward pass, and nothing else.

A small core that every model has, and parts that are chosen: attention, MLP, norms, rotary embedding. A part knows the
names of its sizes (which weight rules are written in) and its fields of megatron-core's TransformerConfig, as plain
values: `mcore/`, the one room that imports megatron, builds the layers from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from owpo_megatron.families.rope import Rope

if TYPE_CHECKING:
    from owpo_megatron.families.family import Family
    from owpo_megatron.families.rules import Rule


# silu; gelu in its tanh approximation; gpt-oss's: gate and up clamped, gate * sigmoid(1.702 gate) * (up + 1)
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
_CLAMPED: dict[str, Any] = dict(activation_func_clamp_value=7.0, glu_linear_offset=1.0)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention: queries, keys and values of one projection, causal."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None  # RMSNorm of each head's queries and keys, or of all heads together
    window: int | None = None  # tokens that attention sees back, itself included; None: all. See `check_context`
    full_layers: tuple[int, ...] = ()  # layers that see all tokens although there is a window
    sinks: bool = False  # a trained score per head that takes its share of the softmax and gives nothing
    gated: bool = False  # results are multiplied by the sigmoid of one more projection
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)

    @property
    def sizes(self) -> dict[str, int]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {"head": self.head_dim, "heads": self.num_heads, "q": q, "gated_q": 2 * q, "kv": kv}

    def window_of(self, layer: int) -> int | None:
        """The window of one layer, counted from 0."""
        return None if layer in self.full_layers else self.window

    def cache_elements(self, tp: int) -> int:
        """Elements that an engine's rank caches per token and layer; it has one key-value head at least."""
        return 2 * max(self.num_kv_heads // tp, 1) * self.head_dim

    def megatron_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = dict(
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_kv_heads,
            kv_channels=self.head_dim,
            add_qkv_bias=self.qkv_bias,
            # with "all" the norm is our own module and split over the tensor-parallel ranks: with this flag
            # megatron-core would sum its gradient over them, as it has to for a norm of one head
            qk_layernorm=self.qk_norm == "head",
            softmax_scale=self.scale,
        )
        fields |= dict(softmax_type="learnable") if self.sinks else {}
        return fields | (dict(attention_output_gate=True) if self.gated else {})


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (arXiv:2405.04434): queries and key-values come from compressed vectors.

    A head's queries and keys have `nope_dim` dimensions without rotary embedding and `rope_dim` with; the latter are,
    for keys, the same in all heads. Scores are scaled by 1 / sqrt(nope_dim + rope_dim), and by YaRN's factor.
    """

    num_heads: int
    q_rank: int | None  # None: queries are not compressed
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    qk_norm: None = None
    window: None = None
    sinks: bool = False
    gated: bool = False

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    def window_of(self, layer: int) -> None:
        """No layer has a window."""

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "q": self.num_heads * (self.nope_dim + self.rope_dim),
            "q_rank": self.q_rank or 0,
            "kv_rank": self.kv_rank,
            "kv_down": self.kv_rank + self.rope_dim,
            "kv_up": self.num_heads * (self.nope_dim + self.v_dim),
            "v": self.num_heads * self.v_dim,
        }

    def cache_elements(self, tp: int) -> int:
        """Elements that an engine's rank caches per token and layer: the compressed vector, on every rank."""
        return self.kv_rank + self.rope_dim

    def megatron_fields(self) -> dict[str, Any]:
        return dict(
            multi_latent_attention=True,
            num_attention_heads=self.num_heads,
            q_lora_rank=self.q_rank,
            kv_lora_rank=self.kv_rank,
            qk_head_dim=self.nope_dim,
            qk_pos_emb_head_dim=self.rope_dim,
            v_head_dim=self.v_dim,
            qk_layernorm=True,
        )


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta net (arXiv:2412.06464), linear attention that takes the place of attention in some layers."""

    key_heads: int
    value_heads: int  # a multiple of key_heads
    key_dim: int  # of a head
    value_dim: int
    kernel: int  # tokens that the convolution sees
    layers: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        return {
            "delta_qkvz": 2 * (keys + values),
            "delta_ba": 2 * self.value_heads,
            "delta_conv": 2 * keys + values,
            "delta_kernel": self.kernel,
            "delta_heads": self.value_heads,
            "delta_head": self.value_dim,
            "delta_v": values,
        }


@dataclass(frozen=True)
class MLP:
    """Gated linear unit: down(silu(gate(x)) * up(x)), or with another activation."""

    ffn_size: int
    activation: Activation = "silu"

    @property
    def sizes(self) -> dict[str, int]:
        return {"ffn": self.ffn_size}

    @property
    def split_sizes(self) -> tuple[int, ...]:
        """Sizes that tensor parallelism divides."""
        return (self.ffn_size,)

    def megatron_fields(self) -> dict[str, Any]:
        return dict(ffn_hidden_size=self.ffn_size)


@dataclass(frozen=True)
class Router:
    """Selection of a token's experts, and their weights."""

    chosen: int  # experts per token
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True  # the chosen experts' scores are divided by their sum
    bias: bool = False  # a constant per expert that is added to the scores for the choice alone
    groups: int = 1  # experts are chosen out of the best `chosen_groups` of so many groups
    chosen_groups: int = 1
    best: int = 2  # a group's score is the sum of so many of its experts' scores
    scale: float = 1.0  # of the weights

    @property
    def chooses_groups_itself(self) -> bool:
        """True where megatron-core would sum the scores of another number of experts."""
        return self.groups > 1 and self.chosen // self.chosen_groups != self.best

    def megatron_fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = dict(
            moe_router_topk=self.chosen,
            moe_router_score_function=self.scores,
            # megatron without pre-softmax: probabilities of the chosen ones alone, which is HF's division by their sum
            moe_router_pre_softmax=self.scores == "softmax" and not self.normalised,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="none",  # the policy gradient alone moves the router
            moe_aux_loss_coeff=0.0,
        )
        if self.scale != 1.0:
            fields |= dict(moe_router_topk_scaling_factor=self.scale)
        if self.bias:
            fields |= dict(moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.0)
        if self.groups > 1:
            fields |= dict(moe_router_num_groups=self.groups, moe_router_group_topk=self.chosen_groups)
        return fields


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token goes to, besides the chosen ones."""

    ffn_size: int
    gated: bool = False  # its answer is multiplied by the sigmoid of one more projection


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, in every layer but those of `dense_layers`."""

    number: int
    ffn_size: int  # of one expert
    router: Router
    shared: SharedExpert | None = None
    activation: Activation = "silu"
    dense: MLP | None = None  # of the layers without experts
    dense_layers: tuple[int, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        sizes = {"experts": self.number, "expert_ffn": self.ffn_size, "expert_ffns": 2 * self.ffn_size, "one": 1}
        if self.shared:
            sizes["shared_ffn"] = self.shared.ffn_size
        return sizes | (self.dense.sizes if self.dense else {})

    @property
    def split_sizes(self) -> tuple[int, ...]:
        """Sizes that tensor parallelism divides."""
        shared = (self.shared.ffn_size,) if self.shared else ()
        return (self.ffn_size, *shared, *(self.dense.split_sizes if self.dense else ()))

    def megatron_fields(self) -> dict[str, Any]:
        fields = self.router.megatron_fields()
        fields |= dict(num_moe_experts=self.number, moe_ffn_hidden_size=self.ffn_size)
        fields |= dict(ffn_hidden_size=self.dense.ffn_size if self.dense else self.ffn_size)
        if self.shared:
            fields |= dict(
                moe_shared_expert_intermediate_size=self.shared.ffn_size, moe_shared_expert_gate=self.shared.gated
            )
        return fields


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
        own = {"hidden": self.hidden_size, "vocab": self.vocab_size}
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
        if self.mlp.activation == "clamped_swiglu":
            fields |= _CLAMPED
        if self.attention.window is not None:
            windowed = [int(self.attention.window_of(layer) is not None) for layer in range(self.num_layers)]
            # megatron counts the tokens before the own one
            fields |= dict(window_size=(self.attention.window - 1, 0), window_attn_skip_freq=windowed)
        if self.layers_differ:
            fields |= dict(moe_layer_freq=[int(self.has_experts(layer)) for layer in range(self.num_layers)])
        if isinstance(self.attention, LatentAttention):
            fields |= self.rope.latent_fields()
        return fields | self.attention.megatron_fields() | self.mlp.megatron_fields()
