"""The policy network: megatron-core's GPTModel, stopped at the hidden states, with our head on top."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig

from owpo_megatron.families import HFModel, padded_vocab_size
from owpo_megatron.head import Fp8Error, Fp8Weight, LogProbs, PolicyHeadOut, fp8_error, logprob, policy_head
from owpo_megatron.head.policy_head import BatchOf
from owpo_megatron.head.shard import VocabShard
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.spec import layer_spec
from owpo_megatron.types import LogpMode, Objective


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


@cpu.scoped
def build_chunks(hf: HFModel, config: TransformerConfig, temperature: float) -> list[PolicyModel]:
    """This rank's pipeline chunks (one, or `vpp` of them), with weights not yet loaded."""
    vpp = config.virtual_pipeline_model_parallel_size
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
            position_embedding_type="yarn" if hf.rope.yarn else "rope",
            rotary_percent=hf.rope.fraction,
            rotary_base=hf.rope.theta,
            rope_scaling=hf.rope.llama3_factor is not None,
            rope_scaling_factor=hf.rope.llama3_factor or 1.0,
            vp_stage=vp_stage,
            temperature=temperature,
            true_vocab_size=hf.vocab_size,
        )
        chunks.append(chunk.to(cpu.device()))
    return chunks
