"""Attention over whole batches: SGLang's torch_native backend loops over the sequences, which a small model feels.

Both functions take the place of methods of TorchNativeAttnBackend, with the same arguments. Sequences are padded to the
longest of their slice, gathered from the paged cache and attended in one call. What this does not cover (sliding
windows, cross-attention, encoders, very long prompts) goes to the loop that they replace.

Legend: B sequences, Q query tokens of a sequence, S cached tokens of a sequence, T query tokens of the batch,
    N slots of the cache, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Elements gathered or masked at a time; 16 MiB of fp32 mask, and few hundred MiB of keys for a large model.
MAX_GATHERED_TOKENS = 1 << 16
MAX_MASK_ELEMENTS = 1 << 22


def install(backend: type) -> None:
    """Replace the two loops of TorchNativeAttnBackend."""
    backend._run_sdpa_forward_decode = _decode_or(backend._run_sdpa_forward_decode)  # type: ignore[attr-defined]
    backend._run_sdpa_forward_extend = _extend_or(backend._run_sdpa_forward_extend)  # type: ignore[attr-defined]


def _decode_or(loop: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def decode(
        self: Any,
        query: torch.Tensor,  # [B, H, D]
        output: torch.Tensor,  # [B, H, D], written
        k_cache: torch.Tensor,  # [N, K, D]
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,  # [requests, max length] slots of the cache
        req_pool_indices: torch.Tensor,  # [B]
        seq_lens: torch.Tensor,  # [B], the new token included
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None:
            return loop(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens,
                scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
            )  # fmt: skip
        for first, last, longest in _slices(seq_lens.tolist(), MAX_GATHERED_TOKENS):
            lens = seq_lens[first:last]
            valid = torch.arange(longest, device=lens.device) < lens[:, None]  # [B, S]
            slots = _slots(req_to_token, req_pool_indices[first:last], valid)
            output[first:last] = scaled_dot_product_attention(
                query[first:last, :, None],
                k_cache[slots].transpose(1, 2).to(query.dtype),
                v_cache[slots].transpose(1, 2).to(query.dtype),
                attn_mask=valid[:, None, None],
                enable_gqa=enable_gqa,
                scale=scaling,
            ).squeeze(2)
        return output

    return decode


def _extend_or(loop: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def extend(
        self: Any,
        query: torch.Tensor,  # [T, H, D]
        output: torch.Tensor,  # [T, H, D], written
        k_cache: torch.Tensor,  # [N, K, D]
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,  # [requests, max length] slots of the cache
        req_pool_indices: torch.Tensor,  # [B]
        seq_lens: torch.Tensor,  # [B], prefix and new tokens
        extend_prefix_lens: torch.Tensor,  # [B], tokens that were in the cache before
        extend_seq_lens: torch.Tensor,  # [B], new tokens
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        new_lens = extend_seq_lens.tolist()
        all_lens = seq_lens.tolist()
        # A mask of [Q, S] for long prompts would cost more than the loop's causal kernel.
        too_long = max(new_lens) * max(all_lens) > MAX_MASK_ELEMENTS
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None or not causal or too_long:
            return loop(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens,
                extend_seq_lens, encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
            )  # fmt: skip
        start = 0
        cost = [all_len * max(1, new_len) for all_len, new_len in zip(all_lens, new_lens, strict=True)]
        for first, last, _ in _slices(cost, MAX_MASK_ELEMENTS):
            count = sum(new_lens[first:last])
            longest_new, longest = max(new_lens[first:last]), max(all_lens[first:last])
            lens, prefix, new = seq_lens[first:last], extend_prefix_lens[first:last], extend_seq_lens[first:last]
            row = torch.arange(longest_new, device=lens.device)
            column = torch.arange(longest, device=lens.device)
            is_token = row < new[:, None]  # [B, Q]
            valid = column < lens[:, None]  # [B, S]
            padded = query.new_zeros(last - first, longest_new, *query.shape[1:])  # [B, Q, H, D]
            padded[is_token] = query[start : start + count]
            mask = (column <= (prefix[:, None] + row)[:, :, None]) & valid[:, None]  # [B, Q, S]
            slots = _slots(req_to_token, req_pool_indices[first:last], valid)
            attended = scaled_dot_product_attention(
                padded.transpose(1, 2),
                k_cache[slots].transpose(1, 2).to(query.dtype),
                v_cache[slots].transpose(1, 2).to(query.dtype),
                attn_mask=mask[:, None],
                enable_gqa=enable_gqa,
                scale=scaling,
            )
            output[start : start + count] = attended.transpose(1, 2)[is_token]
            start += count
        return output

    return extend


def _slots(req_to_token: torch.Tensor, requests: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[B, S] slots of the cache; padding repeats the sequence's first one: 0 * NaN of a stranger's would be NaN."""
    slots = req_to_token[requests, : valid.shape[1]]
    return torch.where(valid, slots, slots[:, :1])


def _slices(sizes: list[int], budget: int) -> Iterator[tuple[int, int, int]]:
    """Consecutive (first, last, largest) so that sequences times largest stays in the budget (one may exceed it)."""
    first, largest = 0, 0
    for index, size in enumerate(sizes):
        if index > first and (index - first + 1) * max(largest, size) > budget:
            yield first, index, largest
            first, largest = index, 0
        largest = max(largest, size)
    yield first, len(sizes), largest
