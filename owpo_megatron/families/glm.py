"""GLM-4, dense (norms before and after, neighbouring dimensions rotated in part), and the mixtures GLM-4.5 to 4.7."""

from __future__ import annotations

from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.llama import attention_rules
from owpo_megatron.families.mlp import MLP, Experts, Router, SharedExpert
from owpo_megatron.families.model import HFModel, Norms
from owpo_megatron.families.reading import HFConfig, attention_of, describe, mlp_of
from owpo_megatron.families.rope import read_rope
from owpo_megatron.families.rules import FUSED_MLP, ROUTER_BIAS, Rule, experts, norms_after, shared_expert
from owpo_megatron.families.rules import MLP as MLP_RULES


def _read_dense(config: HFConfig) -> HFModel:
    raw = config.raw
    rope = read_rope(config.path, raw, partial=True, interleaved=True)
    norms = Norms(raw.rms_norm_eps, before=True, after=True)
    attention = attention_of(config, qkv_bias=bool(raw.attention_bias))
    return describe(config, "glm4", attention, mlp_of(config), norms, rope)


def _dense_rules(model: HFModel) -> tuple[Rule, ...]:
    after = norms_after("post_self_attn_layernorm", "post_mlp_layernorm")
    return (*attention_rules(model), *after, *FUSED_MLP)


def sigmoid_experts(config: HFConfig) -> Experts:
    """Experts behind a sigmoid router with a constant bias, with a shared one; the first layers are dense.

    DeepSeek-V3 has brought them, with config fields of these names.
    """
    raw = config.raw
    config.require("norm_topk_prob", True)  # megatron-core always divides a sigmoid's scores by their sum
    if raw.num_experts_per_tok < 2:
        raise config.refusal("num_experts_per_tok", raw.num_experts_per_tok, "megatron-core needs at least 2 here")
    router = Router(
        raw.num_experts_per_tok,
        "sigmoid",
        bias=True,
        groups=raw.n_group,
        chosen_groups=raw.topk_group,
        scale=raw.routed_scaling_factor,
    )
    return shared_mixture(config, router)


def shared_mixture(config: HFConfig, router: Router) -> Experts:
    """Routed experts and a shared one, the first layers dense, by DeepSeek's config fields."""
    raw = config.raw
    config.require("hidden_act", "silu")
    if not raw.n_shared_experts:
        raise config.refusal("n_shared_experts", raw.n_shared_experts, "not supported without shared experts")
    dense_layers = tuple(range(min(raw.first_k_dense_replace, raw.num_hidden_layers)))
    return Experts(
        raw.n_routed_experts,
        raw.moe_intermediate_size,
        router,
        SharedExpert(raw.moe_intermediate_size * raw.n_shared_experts),
        dense=MLP(raw.intermediate_size) if dense_layers else None,
        dense_layers=dense_layers,
    )


def _read_moe(config: HFConfig) -> HFModel:
    raw = config.raw
    attention = attention_of(
        config, qkv_bias=bool(raw.attention_bias), qk_norm="head" if config.get("use_qk_norm") else None
    )
    rope = read_rope(config.path, raw, partial=True)
    return describe(config, "glm4_moe", attention, sigmoid_experts(config), rope=rope)


def _moe_rules(model: HFModel) -> tuple[Rule, ...]:
    dense = MLP_RULES if model.is_mixed else ()
    return (*attention_rules(model), *dense, *experts(), ROUTER_BIAS, *shared_expert("mlp.shared_experts"))


GLM4 = Family(
    "glm4", ("glm4",), _read_dense, _dense_rules,
    special="norms after attention and MLP, too; partial, interleaved rotary embedding; fused gate and up",
)  # fmt: skip
GLM4_MOE = Family(
    "glm4_moe", ("glm4_moe",), _read_moe, _moe_rules, EngineNames(ties=False),
    ignored=(r"model\.layers\.{num_layers}\.",),
    special="sigmoid router with bias and groups, shared expert, dense first layers, partial rotary embedding",
)  # fmt: skip
