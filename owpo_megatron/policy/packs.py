"""Packs of a policy's passes: which data-parallel rank computes which samples, in which microbatches."""

from __future__ import annotations

from collections.abc import Sequence

from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.packing import (
    Microbatch,
    build_microbatch,
    packed_length,
    padded_to_longest,
    plan_microbatches,
)
from owpo_megatron.mcore.spec import uses_transformer_engine
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.types import Sample

Plan = list[list[list[int]]]
"""Indices of the samples: plan[data-parallel rank][microbatch]."""


class Packs:
    """Plans passes alike on every rank, from lengths alone, and builds this rank's microbatches.

    Args:
        max_tokens: most tokens of a microbatch.
        pad_to: each microbatch's tokens are a multiple of this.
        attention: FLOPs of attention for each token of context, in those of a token's matrix multiplications.
    """

    def __init__(self, topology: Topology, max_tokens: int, pad_to: int, attention: float):
        self._topology = topology
        self._max_tokens = max_tokens
        self._pad_to = pad_to
        self._attention = attention

    def plan(self, samples: Sequence[Sample]) -> Plan:
        # Where two stages interleave, previous and next are the same rank. megatron then mixes up the shapes of what
        # goes forward and what goes back, so all packs get one length; and with just one microbatch a stage its sends
        # and receives cross and hang, so there are twice as many.
        topology = self._topology
        stages = 1 if topology.vpp_size is None else topology.pp_size
        at_least = 1 if topology.vpp_size is None else 2 * stages
        return plan_microbatches(
            self._lengths(samples), topology.dp_size, self._max_tokens, stages, at_least, self._attention
        )

    def build(self, samples: Sequence[Sample], plan: Plan) -> list[Microbatch]:
        """This rank's microbatches, whose samples have their tokens here."""
        topology, own = self._topology, plan[self._topology.dp_rank]
        pad_to = self._pad_to
        if topology.vpp_size is not None:
            pad_to = padded_to_longest(self._lengths(samples), own, pad_to)
        on_host = not uses_transformer_engine()
        return [build_microbatch(samples, indices, pad_to, cpu.device(), topology.context, on_host) for indices in own]

    def _lengths(self, samples: Sequence[Sample]) -> list[int]:
        return [packed_length(sample, self._topology.context.multiple) for sample in samples]


def homes_of(plan: Plan) -> list[int]:
    """The data-parallel rank of each sample.

    Example:
        >>> homes_of([[[2], [0]], [[1], []]])
        [0, 1, 0]
    """
    found = {index: home for home, packs in enumerate(plan) for indices in packs for index in indices}
    return [found[index] for index in range(len(found))]
