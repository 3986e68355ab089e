"""Layouts of HF tensors within one megatron parameter, into it and out of it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from owpo_megatron.families.attention import Attention
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.rules import Rule


def fused(model: HFModel, rule: Rule, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """One rank's pieces of a rule's HF tensors -> its megatron shard."""
    if rule.fuse == "plain":
        return pieces[0]
    if rule.fuse == "gate_up":
        return torch.cat(list(pieces))
    if rule.fuse == "pairs":
        return torch.cat([pieces[0][0::2], pieces[0][1::2]])
    groups = pieces[-1].shape[0] // _rows_of_a_group(model, rule)[-1]
    if rule.fuse == "gated_groups":  # each head's queries and gate -> all queries of a group, then its gates
        by_head = pieces[0].unflatten(0, (groups, -1, 2, _head_dim(model)))
        pieces = [by_head.transpose(1, 2).flatten(0, 3), *pieces[1:]]
    grouped = [piece.reshape(groups, -1, *piece.shape[1:]) for piece in pieces]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def unfused(model: HFModel, rule: Rule, shard: torch.Tensor) -> Sequence[torch.Tensor]:
    """The inverse of `fused`."""
    if rule.fuse == "plain":
        return [shard]
    if rule.fuse == "gate_up":
        return shard.chunk(2)
    if rule.fuse == "pairs":
        return [torch.stack(shard.chunk(2), dim=1).flatten(0, 1)]
    rows = _rows_of_a_group(model, rule)
    grouped = shard.reshape(-1, sum(rows), *shard.shape[1:])
    pieces = [piece.flatten(0, 1) for piece in grouped.split(rows, dim=1)]
    if rule.fuse == "gated_groups":
        by_kind = pieces[0].unflatten(0, (len(grouped), 2, -1, _head_dim(model)))
        pieces[0] = by_kind.transpose(1, 2).flatten(0, 3)
    return pieces


def _rows_of_a_group(model: HFModel, rule: Rule) -> list[int]:
    """Rows that one group has of each part."""
    groups = model.size(rule.groups)
    assert all(model.size(part.shape[0]) % groups == 0 for part in rule.hf)
    return [model.size(part.shape[0]) // groups for part in rule.hf]


def _head_dim(model: HFModel) -> int:
    assert isinstance(model.attention, Attention)
    return model.attention.head_dim
