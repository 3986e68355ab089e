"""Gated delta net (arXiv:2412.06464) over packed sequences, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from owpo_megatron.families import DeltaNet

_CHUNK = 64  # tokens that are computed together


class GatedDeltaNet(MegatronModule):
    """Linear attention whose state forgets by a gate and learns by the delta rule, in place of self-attention.

    megatron-core's own needs a CUDA package and refuses packed sequences. Parameters are named and laid out as in
    Qwen3-Next's checkpoints, and whole on every rank.

    Legend: T tokens, K key heads, V value heads, R value heads of a key head, D size of a head.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, net: DeltaNet, **_: Any):
        super().__init__(config=config)
        assert config.tensor_model_parallel_size == 1, "families.check_parallel refuses it"
        self.net, sizes, dtype = net, net.sizes, config.params_dtype
        self.in_proj_qkvz = torch.nn.Linear(config.hidden_size, sizes["delta_qkvz"], bias=False, dtype=dtype)
        self.in_proj_ba = torch.nn.Linear(config.hidden_size, sizes["delta_ba"], bias=False, dtype=dtype)
        channels = sizes["delta_conv"]
        self.conv1d = torch.nn.Conv1d(
            channels, channels, net.kernel, groups=channels, padding=net.kernel - 1, bias=False, dtype=dtype
        )
        self.dt_bias = torch.nn.Parameter(torch.ones(net.value_heads, dtype=dtype))
        self.A_log = torch.nn.Parameter(torch.zeros(net.value_heads, dtype=dtype))
        self.norm = torch.nn.RMSNorm(net.value_dim, config.layernorm_epsilon, dtype=dtype)
        self.out_proj = torch.nn.Linear(sizes["delta_v"], config.hidden_size, bias=False, dtype=dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, H] -> ([T, 1, H], no bias); no sequence sees another."""
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        edges = packed_seq_params.cu_seqlens_q
        parts = hidden_states.split((edges[1:] - edges[:-1]).tolist())
        return torch.cat([self._one(part.transpose(0, 1)).transpose(0, 1) for part in parts]), None

    def _one(self, hidden: torch.Tensor) -> torch.Tensor:
        """One sequence, [1, T, H] -> [1, T, H]."""
        net, repeat = self.net, self.net.value_heads // self.net.key_heads
        # for each key head: its queries and keys, then values and gates of its value heads
        by_key_head = self.in_proj_qkvz(hidden).unflatten(-1, (net.key_heads, -1))
        values = repeat * net.value_dim
        query, key, value, gate = by_key_head.split([net.key_dim, net.key_dim, values, values], dim=-1)
        beta, alpha = self.in_proj_ba(hidden).unflatten(-1, (net.key_heads, -1)).split([repeat, repeat], dim=-1)
        mixed = torch.cat([tensor.flatten(2) for tensor in (query, key, value)], dim=-1)
        mixed = F.silu(self.conv1d(mixed.transpose(1, 2))[..., : hidden.shape[1]]).transpose(1, 2)
        keys = net.key_heads * net.key_dim
        query, key, value = mixed.split([keys, keys, net.value_heads * net.value_dim], dim=-1)
        query, key = (_unit(t.unflatten(-1, (net.key_heads, -1))).repeat_interleave(repeat, 2) for t in (query, key))
        decay = -self.A_log.float().exp() * F.softplus(alpha.flatten(2).float() + self.dt_bias)
        value, chunk = value.unflatten(-1, (net.value_heads, -1)), min(_CHUNK, hidden.shape[1])
        learning = beta.flatten(2).sigmoid()
        out, _ = torch_chunk_gated_delta_rule(query, key, value, g=decay, beta=learning, chunk_size=chunk)
        gate = gate.flatten(2).unflatten(-1, (net.value_heads, -1))
        return self.out_proj((self.norm(out) * F.silu(gate.float())).to(hidden.dtype).flatten(2))


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length one, as the kernels of the delta rule make them."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
