"""The parts of a model in which tokens see each other: grouped-query attention, latent attention, delta nets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


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
        heads = {"heads": self.num_heads, "kv_heads": self.num_kv_heads}
        return heads | {"head": self.head_dim, "q": q, "gated_q": 2 * q, "kv": kv}

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
            "delta_groups": self.key_heads,
            "delta_k": keys,
            "delta_qkvz": 2 * (keys + values),
            "delta_ba": 2 * self.value_heads,
            "delta_conv": 2 * keys + values,
            "delta_kernel": self.kernel,
            "delta_heads": self.value_heads,
            "delta_head": self.value_dim,
            "delta_v": values,
        }
