"""The policy network: megatron-core's GPTModel, stopped at the hidden states, with our head on top."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import Experts, HFModel, Yarn, padded_vocab_size
from owpo_megatron.head import Fp8Error, Fp8Weight, LogProbs, PolicyHeadOut, fp8_error, logprob, policy_head
from owpo_megatron.head.policy_head import BatchOf
from owpo_megatron.head.shard import VocabShard
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.attention import PackedCoreAttention
from owpo_megatron.types import LogpMode, Objective

try:
    import transformer_engine  # noqa: F401

    HAVE_TRANSFORMER_ENGINE = True
except ImportError:
    HAVE_TRANSFORMER_ENGINE = False

# Fields of TransformerConfig that the trainer relies on.
_SETTLED: dict[str, Any] = dict(
    hidden_dropout=0.0,  # log-probs of one token must not depend on a mask
    attention_dropout=0.0,
    calculate_per_token_loss=True,  # losses are sums, divided once by the global count
    variable_seq_lengths=True,  # packs differ in length
    moe_token_dispatcher_type="alltoall",  # variable_seq_lengths demands it, dense models included
    batch_p2p_comm=False,  # with pp=2 and vpp=2 True gives wrong gradients, without an error
    deallocate_pipeline_outputs=False,
)


class RMSNorm(torch.nn.Module):
    """RMSNorm of the local layer spec; megatron's own asserts sequence parallelism away.

    The mark `sequence_parallel` makes finalize_model_grads sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PolicyModel(GPTModel):
    """One pipeline chunk, which ends at the hidden states; the last one has the head's two passes as methods."""

    def __init__(self, *args: Any, temperature: float, true_vocab_size: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.true_vocab_size = true_vocab_size

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states

    def logprobs(
        self,
        hidden: torch.Tensor,
        target_T: torch.Tensor,
        row_mask_T: torch.Tensor,
        mode: LogpMode = "exact",
        fp8_weight: Fp8Weight | None = None,
    ) -> LogProbs:
        """Log-probs of the targets without gradients; rows out of the mask are zero."""
        return logprob(
            self._whole(hidden), self._head_weight(), target_T, row_mask_T=row_mask_T, mode=mode,
            fp8_weight=fp8_weight, **self._head_options(),
        )  # fmt: skip

    def quantised_head(self) -> Fp8Weight:
        """The head's weight as it is now, for the log-probs of one pass."""
        weight_VH, options = self._head_weight().detach(), self._head_options()
        shard = VocabShard(len(weight_VH), options["vocab_size"], options["group"])
        return Fp8Weight(weight_VH[: shard.valid_rows])

    def fp8_error(self, hidden: torch.Tensor, target_T: torch.Tensor, row_mask_T: torch.Tensor) -> Fp8Error:
        """How far refined FP8 is from exact on some of these tokens."""
        return fp8_error(self._whole(hidden), self._head_weight(), target_T, row_mask_T, **self._head_options())

    def policy_head(
        self,
        hidden: torch.Tensor,
        target_T: torch.Tensor,
        row_mask_T: torch.Tensor,
        batch_of: BatchOf,
        objective: Objective,
    ) -> PolicyHeadOut:
        """The objective's loss. The head's weight gradient is in main_grad when this returns."""
        return policy_head(
            self._whole(hidden), self._head_weight(), target_T, batch_of, objective,
            row_mask_T=row_mask_T, **self._head_options(),
        )  # fmt: skip

    def _whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] on every tensor-parallel rank; the backward reduces the ranks' partial gradients."""
        if self.config.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden)  # backward: reduce-scatter of dh
        else:
            hidden_T1H = copy_to_tensor_model_parallel_region(hidden)  # backward: all-reduce of dh
        return hidden_T1H.squeeze(1)

    def _head_weight(self) -> torch.Tensor:
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _head_options(self) -> dict[str, Any]:
        return dict(
            temperature=self.temperature,
            vocab_size=self.true_vocab_size,
            group=self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None,
        )


def transformer_config(
    hf: HFModel, parallel: ParallelConfig, dtype: torch.dtype, raw: dict[str, Any]
) -> TransformerConfig:
    """megatron's config of an HF model.

    Raises:
        UserError: the raw `megatron:` block names an unknown field or one that the trainer settles itself, or asks for
            what megatron-core refuses.
    """
    fields: dict[str, Any] = dict(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        qk_layernorm=hf.qk_norm,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        sequence_parallel=parallel.sp,
        overlap_p2p_comm=False,
        **_SETTLED,
    )
    if hf.experts:
        fields |= _expert_fields(hf.experts, parallel)
    if cpu.on_cpu():
        fields |= dict(
            use_cpu_initialization=True,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            persist_layer_norm=False,
            apply_rope_fusion=False,
        )
    for name, value in raw.items():
        if name in fields:
            raise UserError(f"megatron.{name}", value, f"the trainer sets it to {fields[name]}; leave it out")
        if name not in TransformerConfig.__dataclass_fields__:
            raise UserError(f"megatron.{name}", value, "unknown field of megatron-core's TransformerConfig")
    try:
        config = TransformerConfig(**fields, **raw)
    except (ValueError, AssertionError) as error:
        raise UserError("megatron", raw, f"megatron-core refuses this combination: {error}") from error
    if hf.rope.yarn:
        _set_yarn(config, hf.rope.yarn)
    return config


def _expert_fields(experts: Experts, parallel: ParallelConfig) -> dict[str, Any]:
    if cpu.on_cpu() and parallel.tp > 1 and parallel.ep > 1:
        remedy = "with parallel.tp > 1 the experts' tokens are gathered in unequal parts, which gloo cannot: CUDA only"
        raise UserError("parallel.ep", parallel.ep, remedy)
    return dict(
        num_moe_experts=experts.number,
        moe_router_topk=experts.chosen,
        moe_ffn_hidden_size=experts.ffn_size,
        # megatron without pre-softmax: probabilities of the chosen ones alone, which is HF's division by their sum
        moe_router_pre_softmax=not experts.normalised,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # the policy gradient alone moves the router
        moe_aux_loss_coeff=0.0,
        moe_grouped_gemm=_uses_transformer_engine(),
        expert_model_parallel_size=parallel.ep,
        # an expert is split over the tensor-parallel ranks like a dense MLP; at ep = 1 megatron-core 0.16.1 does not
        # reduce the experts' gradients otherwise
        expert_tensor_parallel_size=parallel.tp,
    )


def _set_yarn(config: TransformerConfig, yarn: Yarn) -> None:
    """GPTModel and attention read these by name; TransformerConfig has no fields for them."""
    for name, value in dict(
        yarn_rotary_scaling_factor=yarn.factor,
        yarn_original_max_position_embeddings=yarn.original_positions,
        yarn_beta_fast=yarn.beta_fast,
        yarn_beta_slow=yarn.beta_slow,
        yarn_mscale=yarn.mscale,
        yarn_mscale_all_dim=yarn.mscale_all_dim,
        yarn_correction_range_round_to_int=True,
    ).items():
        setattr(config, name, value)


def _uses_transformer_engine() -> bool:
    return HAVE_TRANSFORMER_ENGINE and not cpu.on_cpu()


def layer_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Transformer Engine's layers where it is installed and CUDA is there, else the local ones with our attention."""
    if _uses_transformer_engine():
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    spec = copy.deepcopy(
        get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage)
    )
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedCoreAttention
        if config.num_moe_experts:
            # Saved by its own name, as Transformer Engine's layers do where the norm is not fused into a linear one.
            names = layer.submodules.sharded_state_dict_keys_map
            layer.submodules.sharded_state_dict_keys_map = {
                own: saved for own, saved in names.items() if own != "pre_mlp_layernorm."
            }
        if config.qk_layernorm:
            attention.q_layernorm = RMSNorm
            attention.k_layernorm = RMSNorm
    return spec


@cpu.scoped
def build_chunks(hf: HFModel, config: TransformerConfig, temperature: float) -> list[PolicyModel]:
    """This rank's pipeline chunks (one, or `vpp` of them), with weights not yet loaded."""
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vpp or 1):
        vp_stage = stage if vpp else None
        chunk = PolicyModel(
            config=config,
            transformer_layer_spec=layer_spec(config, vp_stage),
            vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=hf.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf.tied,
            position_embedding_type="yarn" if hf.rope.yarn else "rope",
            rotary_base=hf.rope.theta,
            rope_scaling=hf.rope.llama3_factor is not None,
            rope_scaling_factor=hf.rope.llama3_factor or 1.0,
            vp_stage=vp_stage,
            temperature=temperature,
            true_vocab_size=hf.vocab_size,
        )
        chunks.append(chunk.to(cpu.device()))
    return chunks
