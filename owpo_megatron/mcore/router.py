"""The choice of groups of experts that megatron-core 0.16.1 does not have."""

from __future__ import annotations

from collections.abc import Callable

import torch


class GroupChoice:
    """Choose experts out of the groups whose best experts have the largest sum of scores.

    megatron-core sums as many of a group's experts as it takes from a group on average; DeepSeek-V2 looks at the best
    one alone, DeepSeek-V3 and GLM-4.5 at the best two, whatever the other numbers are. An object of this class takes
    the place of a router's `router_replay`, where megatron-core lets another choice than its own in.

    Args:
        best: experts of a group whose scores are summed.
    """

    def __init__(self, best: int):
        self._best = best

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores and indices of the chosen experts, [T, topk] each, of scores [T, experts]."""
        assert num_groups is not None and group_topk is not None
        grouped = scores.unflatten(1, (num_groups, -1))
        group_scores = grouped.topk(self._best, dim=-1).values.sum(-1)
        chosen = group_scores.topk(group_topk, dim=-1).indices
        unseen = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
        found = grouped.masked_fill(unseen[..., None], -torch.inf).flatten(1).topk(topk, dim=1)
        return found.values, found.indices
