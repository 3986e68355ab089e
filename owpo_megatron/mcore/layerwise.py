"""megatron-core's own forward pass of a stored model, with one layer in memory at a time, in float32 on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.packed_seq_params import PackedSeqParams

from owpo_megatron.config import ParallelConfig
from owpo_megatron.families import Attention, Experts, HFModel
from owpo_megatron.mcore import checkpoint, cpu
from owpo_megatron.mcore.sharded_files import StoredState
from owpo_megatron.mcore.spec import transformer_config
from owpo_megatron.mcore.topology import close_topology, init_topology
from owpo_megatron.mcore.transformer import build_chunks

_FEW_TOKENS = 8  # vocabulary of the one-layer model, whose embedding is unused


class StoredLayers:
    """A one-layer model per kind of layer, which loads the stored layers one after another. Use inside `one_rank`.

    Kinds differ in having experts, a window, and a delta net instead of attention.
    """

    def __init__(self, state: StoredState, model: HFModel):
        self._state, self._model = state, model
        self._chunk_of = cache(self._make_chunk)

    def _make_chunk(self, experts: bool, windowed: bool, linear: bool) -> tuple[Any, Any]:
        """Return (a one-layer model of a kind, its final norm)."""
        mlp, attention, delta = self._model.mlp, self._model.attention, self._model.delta
        if delta is not None:
            delta = replace(delta, layers=(0,) if linear else ())
        if isinstance(attention, Attention):
            attention = replace(attention, full_layers=() if windowed else (0,))
        if isinstance(mlp, Experts):
            mlp = replace(mlp, dense_layers=() if experts else (0,))
        few = replace(
            self._model, num_layers=1, vocab_size=_FEW_TOKENS, tied=True, mlp=mlp, attention=attention, delta=delta
        )
        config = transformer_config(few, ParallelConfig(), torch.float32, {"perform_initialization": False})
        (chunk,) = build_chunks(few, config, temperature=1.0)
        whole = self._model.megatron_fields()
        config.num_layers = whole["num_layers"]  # the number in the stored tensors
        config.moe_layer_freq = whole.get("moe_layer_freq", 1)
        return chunk.eval(), chunk.decoder.final_layernorm

    @torch.no_grad()
    def layer(self, number: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Apply one layer, and after the last one the final norm: [T, H] -> [T, H]."""
        windowed = self._model.attention.window_of(number) is not None
        kind = (self._model.has_experts(number), windowed, self._model.is_linear(number))
        chunk, norm = self._chunk_of(*kind)
        self._load(chunk.decoder, norm, number)
        chunk.decoder.final_layernorm = norm if number == self._model.num_layers - 1 else None
        length = hidden_TH.shape[0]
        edges = torch.tensor([0, length], dtype=torch.int32, device=cpu.device())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=length, max_seqlen_kv=length
        )
        hidden = chunk(None, None, None, decoder_input=hidden_TH[:, None], packed_seq_params=packed)
        return hidden[:, 0]

    @cpu.scoped
    def _load(self, decoder: Any, norm: Any, number: int) -> None:
        """Load a layer as megatron loads a whole model: its keys, offsets and splits determine what is read."""
        decoder.final_layernorm = norm
        decoder.layers[0].layer_number = number + 1
        prefix = "model.decoder."
        wanted, _, factories = load_preprocess(checkpoint.tensors_of(decoder, prefix))
        loaded = apply_factory_merges(dict_list_map_outplace(self._read, wanted), factories)
        here, there = "layers.0.", f"layers.{number}."
        named = {key.removeprefix(prefix).replace(there, here): value for key, value in loaded.items()}
        checkpoint.fill(decoder, named)

    def _read(self, wanted: ShardedTensor) -> torch.Tensor:
        leading = wanted.prepend_axis_num
        first = wanted.global_offset[leading]
        rows = (first, first + wanted.local_shape[0])
        return self._state.tensor(wanted.key, tuple(wanted.global_offset[:leading]), rows)


@contextmanager
def one_rank() -> Iterator[None]:
    """Context with a world of one rank, for using `StoredLayers` or a whole model."""
    init_topology(ParallelConfig(), seed=0)
    try:
        yield
    finally:
        close_topology()
