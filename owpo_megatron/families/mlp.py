"""The parts of a model that take each token by itself: a gated MLP, or experts with their router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# silu; gelu in its tanh approximation; gpt-oss's: gate and up clamped, gate * sigmoid(1.702 gate) * (up + 1)
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
_FIELDS: dict[Activation, dict[str, Any]] = {
    "clamped_swiglu": dict(activation_func_clamp_value=7.0, glu_linear_offset=1.0)
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
        return dict(ffn_hidden_size=self.ffn_size) | _FIELDS.get(self.activation, {})


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
        sizes = {"experts": self.number, "expert_ffn": self.ffn_size, "expert_ffns": 2 * self.ffn_size}
        if self.shared:
            sizes["shared_ffn"] = self.shared.ffn_size
        return sizes | (self.dense.sizes if self.dense else {})

    @property
    def split_sizes(self) -> tuple[int, ...]:
        """Sizes that tensor parallelism divides."""
        shared = (self.shared.ffn_size,) if self.shared else ()
        return (self.ffn_size, *shared, *(self.dense.split_sizes if self.dense else ()))

    def megatron_fields(self) -> dict[str, Any]:
        fields = self.router.megatron_fields() | _FIELDS.get(self.activation, {})
        fields |= dict(num_moe_experts=self.number, moe_ffn_hidden_size=self.ffn_size)
        fields |= dict(ffn_hidden_size=self.dense.ffn_size if self.dense else self.ffn_size)
        if self.shared:
            fields |= dict(
                moe_shared_expert_intermediate_size=self.shared.ffn_size, moe_shared_expert_gate=self.shared.gated
            )
        return fields
