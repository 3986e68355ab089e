"""Policy network: megatron-core's GPTModel up to the hidden states, with our head on top."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig, multi_latent_attention

from owpo_megatron.families import HFModel, padded_vocab_size
from owpo_megatron.head import Head, VocabShard
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.names import is_expert
from owpo_megatron.mcore.router import let_packs_choose
from owpo_megatron.mcore.spec import layer_spec, uses_transformer_engine


class PolicyModel(GPTModel):
    """One pipeline chunk, which returns hidden states; the last one builds the head of a pass."""

    def __init__(self, *args: Any, temperature: float, true_vocab_size: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.true_vocab_size = true_vocab_size

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states

    def head(self) -> Head:
        """Return the head of a pass, with the current weight; for the last chunk only, after its forward."""
        for hook in self.output_layer._forward_pre_hooks.values():  # nobody calls this module: wait for its weight here
            hook(self.output_layer, None)
        tied = self.share_embeddings_and_output_weights
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None
        return Head(weight_VH, self.temperature, VocabShard(len(weight_VH), self.true_vocab_size, group))

    def whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [T, H] on every tensor-parallel rank; the backward reduces the ranks' partial gradients."""
        if self.config.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden)  # backward: reduce-scatter of dh
        else:
            hidden_T1H = copy_to_tensor_model_parallel_region(hidden)  # backward: all-reduce of dh
        return hidden_T1H.squeeze(1)


@cpu.scoped
def build_chunks(hf: HFModel, config: TransformerConfig, temperature: float) -> list[PolicyModel]:
    """Build this rank's pipeline chunks (one, or `vpp` of them), without loading weights."""
    vpp = config.virtual_pipeline_model_parallel_size
    if config.gradient_accumulation_fusion:
        # megatron-core asks for apex at its output layer, although Transformer Engine adds the gradients of all layers;
        # the output layer's own gradient is the head's, who adds it to main_grad itself
        layers._grad_accum_fusion_available = True
    chunks = []
    for stage in range(vpp or 1):
        vp_stage = stage if vpp else None
        chunk = PolicyModel(
            config=config,
            transformer_layer_spec=layer_spec(hf, config, vp_stage),
            vocab_size=padded_vocab_size(hf.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=hf.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=hf.tied,
            # latent attention has a rotary embedding of its own
            position_embedding_type="yarn" if hf.rope.yarn and not config.multi_latent_attention else "rope",
            rotary_percent=hf.rope.fraction,
            rotary_base=hf.rope.theta,
            seq_len_interpolation_factor=hf.rope.linear_factor,
            rope_scaling=hf.rope.llama3_factor is not None,
            rope_scaling_factor=hf.rope.llama3_factor or 1.0,
            vp_stage=vp_stage,
            temperature=temperature / hf.multipliers.logits,  # the head divides logits by it
            true_vocab_size=hf.vocab_size,
        )
        if chunk.pre_process and hf.multipliers.embedding != 1.0:
            chunk.embedding.register_forward_hook(lambda module, given, out: out * hf.multipliers.embedding)
        if hf.experts:
            let_packs_choose(chunk, hf)
        if uses_transformer_engine():
            _correct_marks(chunk)
        chunks.append(chunk.to(cpu.device()))
    return chunks


def _correct_marks(chunk: torch.nn.Module) -> None:
    """Mark parameters of Transformer Engine 2.11 as the local layers mark theirs.

    The mark decides whether a gradient counts once, or once for each tensor-parallel rank, in the norm by which updates
    are clipped. It is wrong for weights that every rank has whole (latent attention's down projections are marked as
    split), and for attention sinks and biases of experts (parts of the model that are not marked).
    """
    for module in chunk.modules():
        if type(module) is multi_latent_attention.TELinear:
            for param in module.parameters():
                param.tensor_model_parallel = False  # type: ignore[attr-defined]
    for name, param in chunk.named_parameters():
        if name.endswith("softmax_offset") or (is_expert(name) and name.rpartition(".")[2].startswith("bias")):
            param.tensor_model_parallel = True  # type: ignore[attr-defined]
