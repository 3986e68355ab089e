"""megatron-core's own forward pass of a stored model with one layer in memory at a time, in float32 on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.packed_seq_params import PackedSeqParams

from owpo_megatron.config import ParallelConfig
from owpo_megatron.families import HFModel
from owpo_megatron.mcore import checkpoint, cpu
from owpo_megatron.mcore.sharded_reader import StoredState
from owpo_megatron.mcore.topology import close_topology, init_topology
from owpo_megatron.mcore.transformer import build_chunks, transformer_config

_FEW_TOKENS = 8  # the embedding of the one-layer model, which nothing uses


class StoredLayers:
    """A one-layer model that takes each stored layer in turn. Used inside `one_rank`."""

    def __init__(self, state: StoredState, model: HFModel):
        self._state, self._layers = state, model.num_layers
        config = transformer_config(model, ParallelConfig(), torch.float32, {"perform_initialization": False})
        config.num_layers = 1
        few = replace(model, num_layers=1, vocab_size=_FEW_TOKENS, tied=True)
        (self._chunk,) = build_chunks(few, config, temperature=1.0)
        config.num_layers = model.num_layers  # how many layers the stored tensors have
        self._norm = self._chunk.decoder.final_layernorm
        self._chunk.eval()

    @torch.no_grad()
    def layer(self, number: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H] through one layer, and behind the last one through the final norm."""
        self._load(number)
        self._chunk.decoder.final_layernorm = self._norm if number == self._layers - 1 else None
        length = hidden_TH.shape[0]
        edges = torch.tensor([0, length], dtype=torch.int32, device=cpu.device())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=length, max_seqlen_kv=length
        )
        hidden = self._chunk(None, None, None, decoder_input=hidden_TH[:, None], packed_seq_params=packed)
        return hidden[:, 0]

    @cpu.scoped
    def _load(self, number: int) -> None:
        """What megatron's own loading does for a whole model: its keys, offsets and splits say what is read."""
        decoder: Any = self._chunk.decoder
        decoder.final_layernorm = self._norm
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
    """A world of one, for as long as `StoredLayers` or a whole model is used."""
    init_topology(ParallelConfig(), seed=0)
    try:
        yield
    finally:
        close_topology()
