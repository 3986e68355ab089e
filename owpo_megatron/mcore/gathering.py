"""Full parameters out of sharded chunks: gathered by buckets, where they are or on global rank 0.

A bucket's parameters are laid out one behind the other in a flat tensor of bytes, which one all-gather brings together.
Weights leave the trainer in one of two ways:

- `Gatherer.whole`: all on global rank 0, for exports and transports that need everything in one place;
- `Gatherer.part`: each pipeline stage's dense parameters, and each expert-parallel index's experts of it, on a rank
  that has them. No weight goes to another stage, or to another expert-parallel index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from owpo_megatron.mcore.names import is_expert, named_shards
from owpo_megatron.mcore.topology import Topology

GATHER_BYTES = 64 << 20  # of a bucket's full parameters: more gains nothing on a network, and costs memory
_ALIGNED = 16  # bytes: a multiple of every dtype's size

Gathered = Iterator[tuple[str, list[torch.Tensor]]]


@dataclass(frozen=True)
class Shape:
    """A rank's shard of a parameter, by its megatron name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """Parameters that one rank can give away whole: a stage's dense ones, or its experts of one index."""

    stage: int
    ep_rank: int | None  # None: the dense parameters
    owner: int  # the lowest global rank that has them
    shapes: tuple[Shape, ...]


class Gatherer:
    """Gathers what the chunks hold at the time; every call is collective, and each rank must exhaust what it gets."""

    def __init__(self, chunks: Sequence[Any], topology: Topology):
        self._chunks, self._topology = chunks, topology

    @cached_property
    def parts(self) -> list[Part]:
        """The same list on every rank.

        The dense parts of all stages come first. A rank may wait in its own part until others are done with theirs, and
        ranks with different experts share dense parameters: in another order they would wait for each other.
        """
        dense, experts = [], []
        for stage in range(self._topology.pp_size):
            for ep_rank in range(self._topology.ep_size):
                owner, shapes = self._places[stage, ep_rank]
                if ep_rank == 0:
                    dense.append(Part(stage, None, owner, tuple(one for one in shapes if not is_expert(one.name))))
                experts.append(Part(stage, ep_rank, owner, tuple(one for one in shapes if is_expert(one.name))))
        return [part for part in dense + experts if part.shapes]

    @torch.no_grad()
    def part(self, part: Part) -> Gathered:
        """Yield (megatron name, its shards in TP order) on the part's owner; nothing on other ranks.

        Only the ranks that share these parameters do anything. Holds one bucket at a time.
        """
        for bucket in self.buckets(part):
            yield from bucket

    @torch.no_grad()
    def buckets(self, part: Part) -> Iterator[list[tuple[str, list[torch.Tensor]]]]:
        """Yield the same bucket by bucket: as often on every rank, empty on all but the owner."""
        topology = self._topology
        shares = part.stage == topology.pp_rank and _has_first_copy(part.ep_rank, topology)
        params = dict(named_shards(self._chunks)) if shares else {}
        for bucket in _buckets(part.shapes, topology):
            shards = _gathered(bucket, params, topology) if shares else []
            mine = topology.rank == part.owner
            yield list(zip((one.name for one in bucket), shards, strict=True)) if mine else []

    @torch.no_grad()
    def whole(self) -> Gathered:
        """Yield (megatron name, its shards in TP order) of every parameter on global rank 0; nothing on other ranks.

        Iterates over pipeline stages, and in each over buckets of its parameters, those of experts followed by what the
        other expert-parallel ranks have in their place. Holds one bucket at a time. A weight that several stages hold
        (tied embeddings) is yielded once for each.
        """
        params = dict(named_shards(self._chunks))
        for stage in range(self._topology.pp_size):
            first = self._places[stage, 0][1]
            number = {one.name: index for index, one in enumerate(first)}
            for bucket in _buckets(first, self._topology):
                for ep_rank in range(self._topology.ep_size):
                    owner, shapes = self._places[stage, ep_rank]
                    here = [shapes[number[one.name]] for one in bucket]
                    yield from _on_main(here, stage, ep_rank, owner, params, self._topology)

    @cached_property
    def _places(self) -> dict[tuple[int, int], tuple[int, list[Shape]]]:
        """(stage, expert-parallel index) -> the lowest rank there, and its parameters.

        That rank is the first of its tensor-parallel group, and of its experts'.
        """
        topology = self._topology
        mine = [(name, tuple(param.shape), param.dtype) for name, param in named_shards(self._chunks)]
        everywhere = topology.all_gather((topology.pp_rank, topology.ep_rank, mine))
        return {
            (stage, ep): (rank, [Shape(*one) for one in shapes])
            for rank, (stage, ep, shapes) in reversed(list(enumerate(everywhere)))
        }


def _on_main(
    bucket: Sequence[Shape],
    stage: int,
    ep_rank: int,
    owner: int,
    params: Mapping[str, torch.Tensor],
    topology: Topology,
) -> Gathered:
    """Bring a bucket from the ranks at this place to global rank 0; dense parameters from the first place alone."""
    found: dict[str, list[torch.Tensor]] = {}
    for experts in (None, ep_rank) if ep_rank == 0 else (ep_rank,):
        kind = [one for one in bucket if is_expert(one.name) == (experts is not None)]
        if not kind:
            continue
        shards = None
        if stage == topology.pp_rank and _has_first_copy(experts, topology):
            shards = _gathered(kind, params, topology)
        if owner != 0:
            shards = _hand_to_main(shards, kind, owner, next(iter(params.values())), topology)
        if topology.is_main:
            assert shards is not None
            found.update(zip((one.name for one in kind), shards, strict=True))
    yield from ((one.name, found[one.name]) for one in bucket if one.name in found)


def _buckets(shapes: Sequence[Shape], topology: Topology) -> Iterator[list[Shape]]:
    """Consecutive parameters of at most GATHER_BYTES when gathered; a larger one by itself."""
    bucket: list[Shape] = []
    size = 0
    for one in shapes:
        whole = one.nbytes * _shard_group(one.name, topology)[1]
        if bucket and size + whole > GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(one)
        size += whole
    if bucket:
        yield bucket


def _has_first_copy(ep_rank: int | None, topology: Topology) -> bool:
    """Whether this rank's dense parameters, or its experts of this index, are those that are gathered in its stage."""
    if ep_rank is None:
        return topology.copy_rank == 0
    return (topology.ep_rank, topology.expert_copy_rank) == (ep_rank, 0)


def _shard_group(name: str, topology: Topology) -> tuple[dist.ProcessGroup, int]:
    """The ranks among which a parameter is split, and how many they are."""
    if is_expert(name):
        return topology.etp_group, topology.etp_size
    return topology.tp_group, topology.tp_size


def _gathered(
    bucket: Sequence[Shape], params: Mapping[str, torch.Tensor], topology: Topology
) -> list[list[torch.Tensor]]:
    """Each parameter's shards in TP order, on every rank that has one; they are all dense, or all experts'."""
    group, size = _shard_group(bucket[0].name, topology)
    mine = [[params[one.name].detach()] for one in bucket]
    if size == 1:
        return mine
    flat = _packed(mine)
    whole = flat.new_empty(size * flat.numel())
    dist.all_gather_single(whole, flat, group=group)
    return _unpacked(whole, bucket, size)


def _hand_to_main(
    shards: list[list[torch.Tensor]] | None, bucket: Sequence[Shape], owner: int, like: torch.Tensor, topology: Topology
) -> list[list[torch.Tensor]] | None:
    """Send what global rank `owner` gathered to global rank 0, in one message."""
    if topology.rank == owner:
        assert shards is not None
        dist.send(_packed(shards), dst=0)
    if not topology.is_main:
        return None
    size = _shard_group(bucket[0].name, topology)[1]
    whole = like.new_empty(size * sum(_padded(one.nbytes) for one in bucket), dtype=torch.uint8)
    dist.recv(whole, src=owner)
    return _unpacked(whole, bucket, size)


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _packed(shards: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """[bytes] uint8: every parameter's first shard, then every parameter's second one, and so on."""
    count = len(shards[0])
    flat = shards[0][0].new_empty(count * sum(_padded(one[0].nbytes) for one in shards), dtype=torch.uint8)
    offset = 0
    for rank in range(count):
        for one in shards:
            shard = one[rank]
            flat[offset : offset + shard.nbytes].view(shard.dtype).view(shard.shape).copy_(shard)
            offset += _padded(shard.nbytes)
    return flat


def _unpacked(whole: torch.Tensor, bucket: Sequence[Shape], count: int) -> list[list[torch.Tensor]]:
    """Views of the `count` shards of each parameter, as `_packed` laid them out."""
    found: list[list[torch.Tensor]] = [[] for _ in bucket]
    offset = 0
    for _ in range(count):
        for shards, one in zip(found, bucket, strict=True):
            shards.append(whole[offset : offset + one.nbytes].view(one.dtype).view(one.shape))
            offset += _padded(one.nbytes)
    return found
