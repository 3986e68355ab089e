"""Build megatron-core's configuration and layer specs from a model that `families` describes as data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import Activation, HFModel, LatentAttention, Yarn, layers_of_stages
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.attention import PackedCoreAttention
from owpo_megatron.mcore.context import check_context_attention
from owpo_megatron.mcore.delta_net import GatedDeltaNet
from owpo_megatron.mcore.fp8_training import fp8_fields
from owpo_megatron.mcore.fusions import Fusion, available, decide, fields_of
from owpo_megatron.mcore.layers import (
    AddingLayer,
    AllHeadsRMSNorm,
    ExpertDownProjection,
    GatedSelfAttention,
    LatentSelfAttention,
    LocalSelfAttention,
    ResultNormLayer,
    RMSNorm,
    scaled_residual,
)

try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute what megatron-core's does, which is compiled when it is first called."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "clamped_swiglu": _quick_gelu,
}
# Fields of TransformerConfig that the trainer relies on.
_SETTLED: dict[str, Any] = dict(
    hidden_dropout=0.0,  # a token's log-prob must not depend on a dropout mask
    attention_dropout=0.0,
    calculate_per_token_loss=True,  # losses are sums, divided once by the global count
    variable_seq_lengths=True,  # packs differ in length
    moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, even for dense models
    batch_p2p_comm=False,  # True gives wrong gradients with pp=2 and vpp=2, without an error
    deallocate_pipeline_outputs=False,
    moe_enable_routing_replay=False,  # router.py has the place
)


# Fields with which parts of a module run without a call of it, or from a recorded graph.
_NOT_CALLED = (
    "moe_shared_expert_overlap",  # reads a shared expert's gate
    "overlap_moe_expert_parallel_comm",
    "cuda_graph_impl",
    "enable_cuda_graph",
    "external_cuda_graph",
)


def transformer_config(
    hf: HFModel, parallel: ParallelConfig, dtype: torch.dtype, raw: dict[str, Any]
) -> TransformerConfig:
    """Return megatron's TransformerConfig of a model.

    Raises:
        UserError: the raw `megatron:` section sets an unknown field or one that the trainer sets itself, or a
            combination that megatron-core refuses.
    """
    kind = MLATransformerConfig if isinstance(hf.attention, LatentAttention) else TransformerConfig
    fields: dict[str, Any] = hf.megatron_fields() | dict(
        activation_func=_ACTIVATIONS[hf.mlp.activation],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        context_parallel_size=parallel.cp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        sequence_parallel=parallel.sp,
        overlap_p2p_comm=False,
        **_SETTLED,
    )
    stages = layers_of_stages(hf.num_layers, parallel.pp)
    if len(set(stages)) > 1:
        fields |= dict(num_layers_in_first_pipeline_stage=stages[0], num_layers_in_last_pipeline_stage=stages[-1])
    if hf.experts:
        fields |= _expert_fields(parallel)
    raw = {name: value for name, value in raw.items() if value is not None or name not in parallel.recompute_fields}
    raw = raw | parallel.recompute_fields
    raw = raw | fp8_fields(raw, hf.experts is not None)
    if hf.experts and raw.get("fp8") and not HAVE_TRANSFORMER_ENGINE:
        remedy = "with experts megatron-core asks for the version of Transformer Engine, which is not installed here"
        raise UserError("megatron.fp8", raw["fp8"], remedy)
    if cpu.on_cpu():
        fields |= dict(
            use_cpu_initialization=True,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )
    fields |= fields_of(fusions_of(hf), raw)
    for name, value in raw.items():
        if name in fields:
            raise UserError(f"megatron.{name}", value, f"the trainer sets it to {fields[name]}; remove it")
        if name not in kind.__dataclass_fields__:
            raise UserError(f"megatron.{name}", value, "unknown field of megatron-core's TransformerConfig")
    _refuse_recomputation_without_te(raw)
    if parallel.overlap == "all":
        _refuse_parts_that_are_not_called(raw)
    if uses_transformer_engine():
        check_context_attention(hf, parallel.cp, parallel.tp, raw.get("cp_comm_type"))
    try:
        # megatron-core refuses biases of experts that tensor-parallel ranks share; our local layers have them
        biases = hf.biases and uses_transformer_engine()
        config = kind(**(fields | {"add_bias_linear": biases}), **raw)
    except (ValueError, AssertionError) as error:
        raise UserError("megatron", raw, f"megatron-core refuses this combination: {error}") from error
    config.add_bias_linear = hf.biases
    if hf.rope.yarn and kind is TransformerConfig:
        _set_yarn(config, hf.rope.yarn)
    return config


def fusions_of(hf: HFModel) -> tuple[Fusion, ...]:
    """The fused kernels of a model on this process's device."""
    if not cpu.on_cpu():
        return decide(hf, available())
    return tuple(replace(one, by=None, why_off="on a GPU only") for one in decide(hf, frozenset()))


def _refuse_recomputation_without_te(raw: dict[str, Any]) -> None:
    """Raise UserError for recompute_modules whose code in megatron-core 0.16.1 calls Transformer Engine."""
    wanted = raw.get("recompute_modules") or []
    needing = sorted(set(wanted) - {"core_attn"})
    if needing and not uses_transformer_engine():
        remedy = f"{', '.join(needing)} needs Transformer Engine; use [core_attn], or recompute_granularity full"
        raise UserError("megatron.recompute_modules", wanted, remedy)


def _refuse_parts_that_are_not_called(raw: dict[str, Any]) -> None:
    """Raise UserError for fields with which weights are read by others than the module that has them, when it is called
    and waits for them."""
    for name in _NOT_CALLED:
        if raw.get(name) not in (None, False, "none"):
            remedy = f"with megatron.{name} weights are read without a wait for their gather; set gradients, or leave "
            raise UserError("parallel.overlap", "all", f"{remedy}megatron.{name} out")


def _expert_fields(parallel: ParallelConfig) -> dict[str, Any]:
    if cpu.on_cpu() and parallel.expert_tp > 1 and parallel.ep > 1:
        remedy = "ranks that share an expert gather unequal numbers of tokens, which gloo cannot: CUDA only"
        if parallel.etp is None:
            remedy += ", or set parallel.etp 1"
        raise UserError("parallel.ep", parallel.ep, remedy)
    return dict(
        moe_grouped_gemm=uses_transformer_engine(),
        expert_model_parallel_size=parallel.ep,
        # at ep = 1 that is tp: megatron-core 0.16.1 would not reduce the gradients of whole experts
        expert_tensor_parallel_size=parallel.expert_tp,
    )


def _set_yarn(config: TransformerConfig, yarn: Yarn) -> None:
    """Set YaRN's attributes, which GPTModel and attention read by name; TransformerConfig has no fields for them."""
    for name, value in dict(
        yarn_rotary_scaling_factor=yarn.factor,
        yarn_original_max_position_embeddings=yarn.original_positions,
        yarn_beta_fast=yarn.beta_fast,
        yarn_beta_slow=yarn.beta_slow,
        yarn_mscale=yarn.mscale,
        yarn_mscale_all_dim=yarn.mscale_all_dim,
        yarn_correction_range_round_to_int=yarn.truncate,
    ).items():
        setattr(config, name, value)


def uses_transformer_engine() -> bool:
    return HAVE_TRANSFORMER_ENGINE and not cpu.on_cpu()


def layer_spec(hf: HFModel, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return Transformer Engine's layers if it and CUDA are available, else local layers with our attention."""
    engine = uses_transformer_engine()
    if config.fp8 and not engine:
        raise UserError("megatron.fp8", config.fp8, "needs Transformer Engine and a CUDA device; leave it out")
    spec = copy.deepcopy(
        get_gpt_decoder_block_spec(config, use_transformer_engine=engine, normalization="RMSNorm", vp_stage=vp_stage)
    )
    if not engine:
        spec.layer_norm = RMSNorm
    spec.layer_specs = [copy.deepcopy(layer) for layer in spec.layer_specs]  # several layers may share one
    first = get_transformer_layer_offset(config, vp_stage)
    for number, layer in enumerate(spec.layer_specs, first):
        if not engine:
            _use_local_modules(layer, hf)
        _use_own_modules(layer, hf)
        if hf.is_linear(number):
            _use_delta_net(layer, hf)
        if hf.local_rope and hf.attention.window_of(number) is not None:
            attention = layer.submodules.self_attention
            attention.module = LocalSelfAttention
            attention.params = {**attention.params, "rope_theta": hf.local_rope.theta}
    return spec


def _use_delta_net(layer: ModuleSpec, hf: HFModel) -> None:
    """Replace attention, and the norm that Transformer Engine fuses into its first projection, by our modules."""
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.self_attention = ModuleSpec(module=GatedDeltaNet, params={"net": hf.delta})
    names = parts.sharded_state_dict_keys_map
    parts.sharded_state_dict_keys_map = {own: saved for own, saved in names.items() if own != "input_layernorm."}


def _use_local_modules(layer: ModuleSpec, hf: HFModel) -> None:
    """Replace norms and attention in one of megatron-core's local layers by ours."""
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedCoreAttention
    if parts.mlp.module is MoELayer:
        # Saved under its own name, as Transformer Engine's layers do when the norm is not fused into a linear layer.
        names = parts.sharded_state_dict_keys_map
        parts.sharded_state_dict_keys_map = {own: saved for own, saved in names.items() if own != "pre_mlp_layernorm."}
        if hf.biases:
            parts.mlp.submodules.experts.submodules.linear_fc2 = ExpertDownProjection
    if isinstance(hf.attention, LatentAttention):
        parts.self_attention.module = LatentSelfAttention
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
        dense = {} if parts.mlp.module is MoELayer else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        parts.sharded_state_dict_keys_map = dense | {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    elif hf.attention.qk_norm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm


def _use_own_modules(layer: ModuleSpec, hf: HFModel) -> None:
    """Add our modules for features without layers in megatron-core. Not run with Transformer Engine yet."""
    parts, norms = layer.submodules, hf.norms
    attention = parts.self_attention.submodules
    if not norms.before:
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        if uses_transformer_engine():  # whose first linear layers have the norm inside
            linear = TESpecProvider().column_parallel_linear()
            attention.linear_qkv = linear
            if parts.mlp.module is not MoELayer:
                parts.mlp.submodules.linear_fc1 = linear
    if hf.attention.gated:
        parts.self_attention.module = GatedSelfAttention
    if hf.biases:
        layer.module = AddingLayer
    if norms.after:
        layer.module = ResultNormLayer
    if hf.multipliers.residual != 1.0:
        assert not norms.after, "no family has both"
        parts.self_attn_bda = parts.mlp_bda = scaled_residual(hf.multipliers.residual)
    if hf.attention.qk_norm == "all":
        heads = {"q_layernorm": hf.attention.num_heads, "k_layernorm": hf.attention.num_kv_heads}
        for name, number in heads.items():
            setattr(attention, name, ModuleSpec(AllHeadsRMSNorm, params={"heads": number}))
