"""Norms and layers that megatron-core 0.16.1 has no modules for, or none that run on a CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig, TransformerLayer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

Add = Callable[[tuple[torch.Tensor, torch.Tensor | None], torch.Tensor, float], torch.Tensor]


class RMSNorm(torch.nn.Module):
    """RMSNorm of the local layers; megatron's own asserts sequence parallelism away.

    With `layernorm_zero_centered_gamma` weights are differences from 1.

    The mark `sequence_parallel` makes finalize_model_grads sum its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.centred = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), float(not self.centred), dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.centred:
            return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over the queries (or keys) of all heads together, which tensor-parallel ranks have in parts.

    Args:
        hidden_size: size of one head.
        heads: heads of the whole model.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self._size = eps, heads * hidden_size
        self._ranks = config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(self._size // self._ranks, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., heads of this rank, head size] -> the same shape."""
        wide = x.flatten(-2).float()
        squares = wide.square().sum(-1, keepdim=True)
        if self._ranks > 1:
            # The sum of all ranks, and in the backward the sum of what all ranks want of it
            squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        normed = wide * torch.rsqrt(squares / self._size + self.eps)
        return (self.weight * normed).to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


class ReplicatedLinear(torch.nn.Module):
    """A linear map whose weight every tensor-parallel rank has whole, for rows of its own part of the sequence."""

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class ExpertDownProjection(RowParallelLinear):
    """An expert's second projection whose bias tensor-parallel ranks add in equal parts.

    The token dispatcher sums the ranks' results, so that a whole bias from each of them would count several times.
    Where tensor-parallel ranks share no expert (expert tensor parallelism of 1), each has biases of its own: their
    gradients are not summed over these ranks, and count on each in the norm.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.tp_group.size() == 1:
            self.bias.sequence_parallel = False
            self.bias.tensor_model_parallel = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, bias = super().forward(x)
        assert bias is not None
        # a copy, since megatron-core adds to it in place, which autograd refuses on one rank, where out is a view
        return out.clone(), bias / self.tp_group.size()


class LatentSelfAttention(MLASelfAttention):
    """megatron-core's latent attention with whole down projections, as Transformer Engine's layers have them.

    With its column-parallel ones the gradient of the keys' rotary part is wrong at tensor parallel sizes above 1: the
    part is gathered and split again, but each rank has only the share of its own heads.
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank)
        down = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config, config.hidden_size, down)


class GatedSelfAttention(SelfAttention):
    """Self-attention with megatron-core's output gate, which it compiles when it is first called; plain here."""

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return (x * torch.sigmoid(gate.reshape(x.shape).float())).to(x.dtype)


class LocalSelfAttention(SelfAttention):
    """Self-attention with a rotary embedding of its own instead of the model's.

    Args:
        rope_theta: base of the frequencies.
    """

    def __init__(self, config: TransformerConfig, *args: Any, rope_theta: float, **kwargs: Any):
        own = copy.copy(config)
        for name in [name for name in vars(own) if name.startswith("yarn_")]:
            delattr(own, name)  # with them, attention multiplies queries and keys by YaRN's factor
        super().__init__(own, *args, **kwargs)
        self._rope = RotaryEmbedding(
            config.kv_channels, 1.0, rotary_base=rope_theta, use_cpu_initialization=config.use_cpu_initialization
        )

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, rotary_pos_emb: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        assert rotary_pos_emb is not None
        own = self._rope(len(rotary_pos_emb), packed_seq=True)
        return super().forward(hidden_states, *args, rotary_pos_emb=own, **kwargs)


class AddingLayer(TransformerLayer):
    """A layer whose additions to the residual have parameters: biases, or norms of what is added.

    megatron-core adds under enable_grad, which would keep the parameters' graph in passes without gradients.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.bias_dropout_add_exec_handler = contextlib.nullcontext


class ResultNormLayer(AddingLayer):
    """A layer that normalises what attention and MLP give before it is added to the residual."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attn_bda = _adding(self.post_attention_layernorm)
        self.mlp_bda = _adding(self.post_mlp_layernorm)


def scaled_residual(multiplier: float) -> Callable[[bool, bool], Add]:
    """megatron's bias-dropout-add for results that are multiplied before they are added."""
    return _adding(lambda x: x * multiplier)


def _adding(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[bool, bool], Add]:
    def bias_dropout_add(training: bool, fused: bool) -> Add:
        def add(result: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float) -> torch.Tensor:
            assert prob == 0.0, "the trainer settles dropout to 0"
            x, bias = result
            return residual + change(x if bias is None else x + bias)

        return add

    return bias_dropout_add
