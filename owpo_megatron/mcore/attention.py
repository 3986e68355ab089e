"""Core attention of the local layer spec: torch SDPA over packed thd sequences (grouped queries, causal)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

# Padding all sequences to the longest allows a single SDPA call; beyond this waste, one call per sequence is cheaper.
_MAX_PADDING_WASTE = 4


class PackedCoreAttention(MegatronModule):
    """Causal attention inside each packed sequence.

    The stock DotProductAttention of the local spec refuses packed sequences; TEDotProductAttention accepts them but
    needs CUDA. Right-padding needs no mask: with causal attention no real query sees a padded key.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend: [T, heads, head_dim] query, [T, kv_heads, head_dim] key and value -> [T, heads * head_dim]."""
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        cu_seqlens = packed_seq_params.cu_seqlens_q
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        assert sum(lengths) == query.shape[0], "the padding tail is a sequence of its own"
        if len(lengths) * max(lengths) <= _MAX_PADDING_WASTE * query.shape[0]:
            out = self._padded(query, key, value, cu_seqlens.long(), max(lengths))
        else:
            parts = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
            out = torch.cat([self._dense(*(t.unsqueeze(0) for t in qkv)).squeeze(0) for qkv in parts])
        return out.flatten(1)

    def _padded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, longest: int
    ) -> torch.Tensor:
        num_seqs, total = cu_seqlens.numel() - 1, query.shape[0]
        tokens = torch.arange(total, device=query.device)
        row = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
        slot = row * longest + tokens - cu_seqlens[row]

        def pad(tensor: torch.Tensor) -> torch.Tensor:
            flat = tensor.new_zeros((num_seqs * longest, *tensor.shape[1:])).index_copy(0, slot, tensor)
            return flat.view(num_seqs, longest, *tensor.shape[1:])

        return self._dense(pad(query), pad(key), pad(value)).flatten(0, 1).index_select(0, slot)

    def _dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend within S sequences padded to L tokens; arguments and result are [S, L, heads, head_dim]."""
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)
