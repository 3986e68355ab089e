"""Core attention of the local layer spec: torch SDPA over packed thd sequences.

Grouped queries, causal; with a window or attention sinks where the model has them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from owpo_megatron.mcore.context import gathered_order

# Padding all sequences to the longest allows a single SDPA call; beyond this waste, one call per sequence is cheaper.
_MAX_PADDING_WASTE = 4


class PackedCoreAttention(MegatronModule):
    """Causal attention inside each packed sequence.

    The stock DotProductAttention of the local spec refuses packed sequences; TEDotProductAttention accepts them but
    needs CUDA. Right-padding needs no mask: with causal attention no real query sees a padded key.

    With context parallelism keys and values are gathered from all ranks, and this rank's two chunks of queries of each
    sequence (see mcore/context.py) attend to all keys up to them; the backward sums what the ranks want of a key.

    A sink is a trained score of a head that takes part in every softmax of it and adds nothing to the result. Its
    parameter is named as Transformer Engine names it.
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
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        self.softmax_scale = softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # tokens, the own one included
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

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
        """Attend: [T, heads, head_dim] query, [T, kv_heads, head_dim] key and value -> [T, heads * head_dim].

        With context parallelism these are this rank's rows, [T / cp, ...]; the sequences' lengths are whole.
        """
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        cu_seqlens = packed_seq_params.cu_seqlens_q
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        ranks = self.config.context_parallel_size
        assert sum(lengths) == query.shape[0] * ranks, "the padding tail is a sequence of its own"
        if ranks > 1:
            out = self._in_chunks(query, key, value, lengths)
        elif len(lengths) * max(lengths) <= _MAX_PADDING_WASTE * query.shape[0]:
            out = self._padded(query, key, value, cu_seqlens.to(query.device, torch.int64), max(lengths))
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

    def _in_chunks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        group, size = parallel_state.get_context_parallel_group(), self.config.context_parallel_size
        order_T = gathered_order(lengths, size).to(query.device)
        key, value = (
            gather_from_sequence_parallel_region(tensor, group=group).index_select(0, order_T)
            for tensor in (key, value)
        )
        queries = query.split([length // (2 * size) for length in lengths for _ in range(2)])
        out, start = [], 0
        for sequence, length in enumerate(lengths):
            chunk = length // (2 * size)
            for half, number in enumerate((group.rank(), 2 * size - 1 - group.rank())):
                keys = slice(start, start + (number + 1) * chunk)
                q, k, v = (t.unsqueeze(0) for t in (queries[2 * sequence + half], key[keys], value[keys]))
                out.append(self._dense(q, k, v, first=number * chunk).squeeze(0))
            start += length
        return torch.cat(out)

    def _dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Attend within S sequences padded to L tokens; arguments and result are [S, L, heads, head_dim].

        Args:
            first: place of the first query among the keys, which end with the last query's.
        """
        mask = self._mask(query, first)
        if self.softmax_offset is not None:  # one more key, whose value is zero
            key, value = (F.pad(tensor, (0, 0, 0, 0, 0, 1)) for tensor in (key, value))
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return out.transpose(1, 2)

    def _mask(self, query: torch.Tensor, first: int) -> torch.Tensor | None:
        """Return what is added to scores, [heads, L, K + 1] with sinks last, or the seen ones, [L, K]; None: causal.

        There are K = L + `first` keys.
        """
        length, heads = query.shape[1], query.shape[2]
        if self.softmax_offset is None and not first and (self.window is None or self.window >= length):
            return None
        seen = query.new_ones(length, first + length, dtype=torch.bool).tril(first)
        if self.window is not None:
            seen = seen.triu(first + 1 - self.window)
        if self.softmax_offset is None:
            return seen
        unseen = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
        sinks = self.softmax_offset.to(query.dtype)[:, None, None]
        return torch.cat([unseen.expand(heads, -1, -1), sinks.expand(-1, length, 1)], dim=-1)
