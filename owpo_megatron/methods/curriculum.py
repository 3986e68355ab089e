"""The curriculum of a stage: how many samples of a group are reweighted, and which.

A stage is the interval between two reference refreshes; with a fixed reference it is the whole run.
Shapes: P prompts, G siblings of a prompt.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def num_active(step_in_stage: int, stage_steps: int, group_size: int) -> int:
    """Active samples of a group: the rounded straight line from G at the stage's first step to 1 at its last.

    Paper, Algorithm 1 line 6. Halves round to the even number (exact arithmetic, so every rank agrees).

    Args:
        step_in_stage: 0 .. stage_steps - 1.
        stage_steps: steps of the stage; a stage of one step keeps every sample active.
        group_size: G.

    Example:
        >>> [num_active(step, 4, 16) for step in range(4)]
        [16, 11, 6, 1]
    """
    assert 0 <= step_in_stage < stage_steps, f"step {step_in_stage} is outside a stage of {stage_steps} steps"
    assert group_size >= 1
    if stage_steps == 1:
        return group_size
    return round(group_size - Fraction((group_size - 1) * step_in_stage, stage_steps - 1))


def top_active(advantage_PG: torch.Tensor, n_act: int) -> torch.Tensor:
    """Mask [P, G] of the `n_act` samples of each group with the largest |advantage| (Algorithm 1 line 8).

    Ties go to the lower submission index: completion order would favour short answers, which finish first.

    Example:
        >>> import torch
        >>> top_active(torch.tensor([[1.0, -1.0, 0.5]]), 1)
        tensor([[ True, False, False]])
    """
    group_size = advantage_PG.shape[1]
    assert 0 <= n_act <= group_size, f"{n_act} active samples in groups of {group_size}"
    order_PG = advantage_PG.abs().sort(dim=1, descending=True, stable=True).indices
    active_PG = advantage_PG.new_zeros(advantage_PG.shape).bool()
    return active_PG.scatter(1, order_PG[:, :n_act], True)
