"""Batched attention: SGLang's torch_native backend loops over sequences, which dominates the time of a small model.

Both functions replace methods of TorchNativeAttnBackend, with the same arguments. Sequences are padded to the longest
of their slice, gathered from the paged cache and attended in one call, in float64: rounding the result once hides the
order of its sums, so that a sequence gets the same bits whatever it is batched and padded with. Sliding windows and
attention sinks are covered; the other cases (cross-attention, encoders) fall back to the original loop.

Legend: B sequences, Q query tokens of a sequence, S cached tokens of a sequence, T query tokens of the batch,
    N slots of the cache, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Limits of one pass: gathered tokens (B * S), and elements of the mask (B * Q * S; 32 MiB in float64).
MAX_GATHERED_TOKENS = 1 << 16
MAX_MASK_ELEMENTS = 1 << 22


def install(backend: type) -> None:
    """Replace the two loops of TorchNativeAttnBackend, and accept the sinks that gpt-oss passes."""
    backend._run_sdpa_forward_decode = _decode_or(backend._run_sdpa_forward_decode)  # type: ignore[attr-defined]
    backend._run_sdpa_forward_extend = _extend_or(backend._run_sdpa_forward_extend)  # type: ignore[attr-defined]
    for name in ("forward_decode", "forward_extend"):
        setattr(backend, name, _taking_sinks(getattr(backend, name)))


def _taking_sinks(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward with one more argument, which is kept for the loops' replacements: they are called inside it."""

    @functools.wraps(forward)
    def with_sinks(self: Any, *args: Any, sinks: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        self.owpo_sinks = sinks
        return forward(self, *args, **kwargs)

    return with_sinks


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
        cache = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if encoder_lens is not None or is_cross_attn:
            options = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
            return loop(self, query, output, *cache, *options)
        one, sinks = torch.ones_like(seq_lens), getattr(self, "owpo_sinks", None)
        return _attend(query, output, *cache, seq_lens - 1, one, scaling, enable_gqa, sliding_window_size, sinks)

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
        cache = (k_cache, v_cache, req_to_token, req_pool_indices, seq_lens)
        if encoder_lens is not None or is_cross_attn or not causal:
            options = (encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size)
            return loop(self, query, output, *cache, extend_prefix_lens, extend_seq_lens, *options)
        lengths, sinks = (extend_prefix_lens, extend_seq_lens), getattr(self, "owpo_sinks", None)
        return _attend(query, output, *cache, *lengths, scaling, enable_gqa, sliding_window_size, sinks)

    return extend


def _attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    requests: torch.Tensor,
    all_lens: torch.Tensor,
    prefix_lens: torch.Tensor,
    new_lens: torch.Tensor,
    scaling: float | None,
    enable_gqa: bool,
    window: int | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of each sequence's new tokens to its cached ones, themselves included; fills `output`.

    Args:
        window: tokens before its own that a token sees; None: all.
        sinks_H: a score per head that takes part in every softmax and adds nothing.
    """
    starts = new_lens.cumsum(0) - new_lens  # [B], in query
    for first, last, longest in _slices(all_lens.tolist(), MAX_GATHERED_TOKENS):
        part = slice(first, last)
        column = torch.arange(longest, device=query.device)
        valid = column < all_lens[part, None]  # [B, S]
        slots = _slots(req_to_token, requests[part], valid)
        keys = k_cache[slots].transpose(1, 2).double()  # [B, K, S, D]
        values = v_cache[slots].transpose(1, 2).double()
        if sinks_H is not None:  # one more key, whose value is zero
            keys, values = (torch.nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in (keys, values))
        most_rows = int(new_lens[part].max())
        step = max(1, MAX_MASK_ELEMENTS // (valid.numel() * (1 if sinks_H is None else len(sinks_H))))
        for row_start in range(0, most_rows, step):
            row = torch.arange(row_start, min(row_start + step, most_rows), device=query.device)
            is_token = row < new_lens[part, None]  # [B, Q]
            token = (starts[part, None] + row).clamp_(max=len(query) - 1)  # [B, Q], in query
            own = (prefix_lens[part, None] + row)[:, :, None]
            seen = (column <= own) & valid[:, None]  # [B, Q, S]
            if window is not None:
                seen &= column >= own - window
            attended = scaled_dot_product_attention(
                query[token].transpose(1, 2).double(),
                keys,
                values,
                attn_mask=seen[:, None] if sinks_H is None else _scores(seen, sinks_H),
                enable_gqa=enable_gqa,
                scale=scaling,
            )
            output[token[is_token]] = attended.transpose(1, 2)[is_token].to(output.dtype)
    return output


def _scores(seen: torch.Tensor, sinks_H: torch.Tensor) -> torch.Tensor:
    """Return [B, H, Q, S + 1]: what is added to the scores of [B, Q, S] seen tokens, and the sinks."""
    unseen = torch.zeros_like(seen, dtype=torch.float64).masked_fill_(~seen, -torch.inf)[:, None]
    sinks = sinks_H.double()[:, None, None].expand(len(seen), -1, seen.shape[1], 1)
    return torch.cat([unseen.expand(-1, len(sinks_H), -1, -1), sinks], dim=-1)


def _slots(req_to_token: torch.Tensor, requests: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return [B, S] slots of the cache; padding repeats the sequence's first slot, since another's NaN * 0 is NaN."""
    slots = req_to_token[requests, : valid.shape[1]]
    return torch.where(valid, slots, slots[:, :1])


def _slices(sizes: list[int], budget: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, last, largest) of consecutive slices with count * largest <= budget; a single one may exceed it."""
    first, largest = 0, 0
    for index, size in enumerate(sizes):
        if index > first and (index - first + 1) * max(largest, size) > budget:
            yield first, index, largest
            first, largest = index, 0
        largest = max(largest, size)
    yield first, len(sizes), largest
