"""Weights as they leave the trainer: whole, under HF names, on global rank 0 or on every rank that has a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, hf_shapes, stack_of, stacked, to_hf
from owpo_megatron.mcore.gathering import Gatherer
from owpo_megatron.mcore.topology import Topology


class LeavingWeights:
    """Reads what the chunks hold at the time of a call. Everything is collective over all ranks."""

    def __init__(self, hf: HFModel, chunks: Sequence[Any], topology: Topology):
        self._hf, self._topology = hf, topology
        self._gatherer = Gatherer(chunks, topology)

    def whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, full tensor) on global rank 0, in a fixed order; other ranks exhaust an empty iterator."""
        yield from self._named(self._gatherer.whole())

    @cached_property
    def senders(self) -> list[int]:
        """The global rank that has each part of `parts`.

        Rank 0 alone where the model is in one part, or where a checkpoint's tensors hold experts of several parts.
        """
        spread = self._topology.ep_size > 1 and self._stacks
        owners = [part.owner for part in self._gatherer.parts]
        return [0] if spread or set(owners) == {0} else owners

    def parts(self) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """Yield for each part (HF name, full tensor) on its sender; other ranks exhaust an empty iterator.

        Every rank walks through every part, in order; it waits only in those that it shares.
        """
        if len(self.senders) == 1:
            yield self.whole()
            return
        for part in self._gatherer.parts:
            yield self._named(self._gatherer.part(part))

    def in_step(self) -> Iterator[tuple[int, list[tuple[str, torch.Tensor]]]]:
        """Yield (sender, (HF name, full tensor) pairs) bucket by bucket, as often on every rank; pairs on the sender.

        Raises:
            UserError: a tensor of a checkpoint is made of several buckets.
        """
        if self._stacks:
            remedy = "on several nodes it sends no tensors of all experts of a layer; use tensor"
            raise UserError("sync.transport", "ipc", remedy)
        for part in self._gatherer.parts:
            for bucket in self._gatherer.buckets(part):
                yield part.owner, list(self._single(bucket))

    @cached_property
    def _stacks(self) -> bool:
        return any(stack_of(name) for name in hf_shapes(self._hf))

    def _named(self, gathered: Iterable[tuple[str, list[torch.Tensor]]]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from stacked(self._hf.num_experts, self._single(gathered))

    def _single(self, gathered: Iterable[tuple[str, list[torch.Tensor]]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same with every expert's tensors for themselves."""
        seen: set[str] = set()
        for name, shards in gathered:
            for hf_name, tensor in to_hf(self._hf, name, shards):
                if hf_name not in seen:  # a tied embedding comes from the first and from the last stage
                    seen.add(hf_name)
                    yield hf_name, tensor
