"""Attention of a decode step over keys and values that lie together, instead of a gather per layer and step.

SGLang's cache keeps every token in a slot of its own. `Rows` has a copy of the running requests' keys and values, a row
each, to which a step appends one token; it is made from the cache when requests join. The copy is cut into parts of
`PART` tokens, and each part is a product of a fixed size: its bits depend neither on other requests nor on the length
that the longest of them gives to all. Parts are added one after the other, so that those beyond a request's end, all
zero, change nothing. Narrow models, whose attention costs little, are computed in float64 and rounded once, as a
prefill is (attention.py); wide ones in float32.

Legend: B requests of the batch, R rows, S tokens of a row (a multiple of PART), N slots of the cache, H query heads,
    K key-value heads, D head size (of the keys; that of the values may be another).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PART = 32
# Rows of requests that have ended are computed too, until fewer than this share of the rows is in use.
USED = 0.75
# Key-value heads times head size up to which attention is in float64.
NARROW = 64
# Rows may have room for this many times the tokens of the cache; beyond it, long and short ones are too unlike.
MOST_ROOM = 2


@dataclass(frozen=True)
class Step:
    """Facts that all layers of one decode step share."""

    requests: torch.Tensor  # [B] places in SGLang's table of requests
    lengths: torch.Tensor  # [B], the new token included
    rows: torch.Tensor | None  # [B]; None: 0 .. R - 1
    count: int  # R
    parts: int
    is_new: bool  # the rows have to be made from the cache
    mask: torch.Tensor  # [R, S] 0, or -inf beyond a row's end; float64


class Rows:
    """The rows of the running requests: bookkeeping once per step, keys and values per layer."""

    def __init__(self) -> None:
        self._made_for: list[int] = []  # the request of each row
        self._length: dict[int, int] = {}  # tokens in the rows of running requests
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # [parts, R, K, PART, D]

    def forget(self, requests: Sequence[int]) -> None:
        """Other tokens are being put into these places of the table of requests."""
        for request in requests:
            self._length.pop(request, None)

    def step(self, requests: torch.Tensor, lengths: torch.Tensor) -> Step:
        """Plan a step for these requests [B] with so many tokens each [B], the new one included."""
        ids, ends = requests.tolist(), lengths.tolist()
        known = all(self._length.get(one) == end - 1 for one, end in zip(ids, ends, strict=True))
        is_new = not known or len(ids) < USED * len(self._made_for)
        if is_new:
            self._made_for, self._layers = ids, {}
        self._length = dict(zip(ids, ends, strict=True))
        count, parts = len(self._made_for), -(-max(ends) // PART)
        row_of = {one: row for row, one in enumerate(self._made_for)}
        rows = None if ids == self._made_for else torch.tensor([row_of[one] for one in ids])
        # a row out of use sees its first token: a softmax over nothing is NaN
        last = torch.tensor([self._length.get(one, 1) for one in self._made_for])
        beyond = torch.arange(parts * PART) >= last[:, None]
        mask = torch.zeros(beyond.shape, dtype=torch.float64).masked_fill_(beyond, -torch.inf)
        return Step(requests, lengths, rows, count, parts, is_new, mask)

    def of_layer(
        self, index: int, step: Step, new: Sequence[torch.Tensor], caches: Sequence[torch.Tensor], table: torch.Tensor
    ) -> list[torch.Tensor]:
        """Keys and values [parts, R, K, PART, D] of a layer, with the step's tokens.

        Args:
            new: keys and values [B, K, D] of the step's tokens.
            caches: keys and values [N, K, D] of all tokens, the new ones too.
            table: [requests, max length] slots of the cache.
        """
        if step.is_new:
            slots = table[step.requests, : step.parts * PART].long()  # beyond a row's end: any, set to zero below
            slots = torch.nn.functional.pad(slots, (0, step.parts * PART - slots.shape[1]))
            made = [_cut(cache, slots, step) for cache in caches]
            self._layers[index] = (made[0], made[1])
            return made
        kept = self._layers[index]
        if kept[0].shape[0] < step.parts:
            kept = (_longer(kept[0], step.parts), _longer(kept[1], step.parts))
            self._layers[index] = kept
        last = step.lengths - 1
        rows = torch.arange(step.count) if step.rows is None else step.rows
        for whole, tokens in zip(kept, new, strict=True):
            whole[last // PART, rows, :, last % PART] = tokens.to(whole.dtype)
        return [whole[: step.parts] for whole in kept]


def _cut(cache: torch.Tensor, slots: torch.Tensor, step: Step) -> torch.Tensor:
    is_narrow = cache[0].numel() <= NARROW
    tokens = cache[slots.clamp_(0, len(cache) - 1)].to(torch.float64 if is_narrow else cache.dtype)  # [R, S, K, D]
    tokens.masked_fill_(step.mask[:, :, None, None] != 0, 0.0)
    shape = (step.count, step.parts, PART, *tokens.shape[2:])
    return tokens.view(shape).permute(1, 0, 3, 2, 4).contiguous()


def _longer(kept: torch.Tensor, parts: int) -> torch.Tensor:
    # zeros: what is not written yet is multiplied by probabilities of 0, and 0 * NaN is NaN
    longer = kept.new_zeros(parts + parts // 2, *kept.shape[1:])
    longer[: len(kept)] = kept
    return longer


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: Step, scaling: float) -> torch.Tensor:
    """[B, H, D] attention of each request's new token to all its tokens, itself included."""
    parts, count, kv_heads, _, size = keys.shape
    dtype, query = query.dtype, query.to(keys.dtype)
    if step.rows is not None:
        query = query.new_zeros(count, *query.shape[1:]).index_copy_(0, step.rows, query)
    grouped = (query * scaling).view(1, count, kv_heads, -1, size)
    group = grouped.shape[3]
    repeated = grouped.expand(parts, -1, -1, -1, -1).reshape(-1, group, size)
    scores = torch.bmm(repeated, keys.flatten(0, 2).transpose(1, 2))
    scores = scores.view(parts, count, kv_heads, group, PART).permute(1, 2, 3, 0, 4).flatten(3)
    shares = scores.add_(step.mask.to(keys.dtype)[:, None, None]).softmax(-1).view(count, kv_heads, group, parts, PART)
    summed = torch.bmm(shares.permute(3, 0, 1, 2, 4).reshape(-1, group, PART), values.flatten(0, 2))
    partial = summed.view(parts, count, kv_heads * group, -1)
    out = partial[0]
    for index in range(1, parts):
        out += partial[index]
    return out.to(dtype) if step.rows is None else out[step.rows].to(dtype)


def install(backend: Any) -> None:
    """Replace TorchNativeAttnBackend's decode, and note in each forward pass what it does to the rows.

    After attention.install: what is not covered here (windows, sinks, other caches) goes on there.
    """
    backend.init_forward_metadata = _noting(backend.init_forward_metadata)
    backend.forward_decode = _decode_or(backend.forward_decode)


def _noting(original: Callable[..., None]) -> Callable[..., None]:
    def init_forward_metadata(self: Any, forward_batch: Any) -> None:
        original(self, forward_batch)
        if not hasattr(self, "owpo_rows"):
            self.owpo_rows = Rows()
        self.owpo_step = None
        if not forward_batch.forward_mode.is_decode():
            self.owpo_rows.forget(forward_batch.req_pool_indices.tolist())
            return
        step = self.owpo_rows.step(forward_batch.req_pool_indices, forward_batch.seq_lens)
        if step.count * step.parts * PART <= MOST_ROOM * self.token_to_kv_pool.size:
            self.owpo_step = step
        else:
            self.owpo_rows = Rows()

    return init_forward_metadata


def _decode_or(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward_decode(
        self: Any,
        q: torch.Tensor,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if sinks is not None or not (self.owpo_step and save_kv_cache and _is_plain(layer, self.token_to_kv_pool, q)):
            return original(self, q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks)
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        pool, step = self.token_to_kv_pool, self.owpo_step
        pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        new = (k.view(-1, layer.tp_k_head_num, layer.qk_head_dim), v.view(-1, layer.tp_v_head_num, layer.v_head_dim))
        caches, table = pool.get_kv_buffer(layer.layer_id), self.req_to_token_pool.req_to_token
        keys, values = self.owpo_rows.of_layer(layer.layer_id, step, new, caches, table)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        return attend(query, keys, values, step, layer.scaling).flatten(1)

    return forward_decode


def _is_plain(layer: Any, pool: Any, query: torch.Tensor) -> bool:
    """Whether this is causal attention to all of a float32 cache of keys and values per head."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    is_float32 = query.dtype == pool.dtype == torch.float32
    return (
        is_float32 and type(pool) is MHATokenToKVPool and not layer.is_cross_attention and layer.sliding_window_size < 0
    )
