"""The choice of groups of experts, by numbers worked by hand."""

from __future__ import annotations

import torch

from owpo_megatron.mcore.router import GroupChoice

# three groups of three experts; the groups' best experts 0.6, 0.5, 0.4, their two best together 0.6, 0.9, 0.75
SCORES = torch.tensor([[0.6, 0.0, 0.0, 0.5, 0.4, 0.1, 0.4, 0.35, 0.3]])


def chosen(best: int, groups: int, experts: int) -> list[int]:
    values, indices = GroupChoice(best).get_replay_topk(SCORES, experts, 3, groups)
    assert torch.equal(values, SCORES.gather(1, indices))
    return sorted(indices[0].tolist())


def test_groups_by_their_best_expert() -> None:
    assert chosen(best=1, groups=2, experts=3) == [0, 3, 4]
    assert chosen(best=1, groups=1, experts=1) == [0]


def test_groups_by_their_two_best() -> None:
    """The group of the best expert of all is not chosen: 0.6 + 0 is less than 0.4 + 0.35."""
    assert chosen(best=2, groups=2, experts=3) == [3, 4, 6]
    assert chosen(best=2, groups=1, experts=2) == [3, 4]
