"""Group-normalised advantages, and the other ways to centre and scale the rewards of a step.

Shapes: P prompts, G siblings of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

    from owpo_megatron.methods.method import StepView

_EPS = 1e-6  # keeps a nearly constant group finite; the paper's framework uses the same value


def group_advantages(reward_PG: torch.Tensor, std: Literal["unbiased", "population"] = "unbiased") -> torch.Tensor:
    """(R - mean) / (std + 1e-6) within each group (paper, Eq. 1).

    Args:
        reward_PG: rewards [P, G], one row per group. Integers become float32; float64 stays float64.
        std: divide the squared deviations by G - 1 (`unbiased`) or by G (`population`).

    Returns:
        [P, G]. A group whose rewards are all equal gets exactly 0, also where rounding moves its mean.

    Raises:
        UserError: `std` is neither of the two.

    Example:
        >>> import torch
        >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), std="population").round(decimals=3)
        tensor([[ 1., -1.],
                [ 0.,  0.]])
    """
    if std not in ("unbiased", "population"):
        raise UserError("algorithm.advantage_std", std, "use unbiased or population")
    assert reward_PG.dim() == 2, f"rewards must be [prompts, siblings], not {tuple(reward_PG.shape)}"
    if str(reward_PG.dtype) != "torch.float64":
        reward_PG = reward_PG.float()
    group_size = reward_PG.shape[1]
    deviation_PG = reward_PG - reward_PG.mean(dim=1, keepdim=True)
    # max(1): a group of one has no spread and is caught as all-equal below
    divisor = max(group_size - 1, 1) if std == "unbiased" else group_size
    std_P1 = (deviation_PG.square().sum(dim=1, keepdim=True) / divisor).sqrt()
    all_equal_P1 = reward_PG.amax(dim=1, keepdim=True) == reward_PG.amin(dim=1, keepdim=True)
    return (deviation_PG / (std_P1 + _EPS)).masked_fill(all_equal_P1, 0)


def in_groups(step: StepView, of_group: Callable[[list[float]], Sequence[float]]) -> list[float]:
    """[N] `of_group` of the rewards of each group's samples that count, in their places; 0 for the other samples.

    Example:
        `in_groups(step, centred)`: R - mean of the group.
    """
    out = [0.0] * len(step.reward_N)
    for members in step.groups:
        for index, value in zip(members, of_group([step.reward_N[one] for one in members]), strict=True):
            out[index] = value
    return out


def centred(values: Sequence[float]) -> list[float]:
    """Each value minus the mean; exactly 0 where all are equal."""
    if min(values) == max(values):
        return [0.0] * len(values)
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def z_scores(values: Sequence[float]) -> list[float]:
    """(value - mean) / (unbiased std + 1e-6); exactly 0 where all are equal."""
    deviations = centred(values)
    std = math.sqrt(sum(one * one for one in deviations) / max(len(values) - 1, 1))
    return [one / (std + _EPS) for one in deviations]


def whitened_over_tokens(step: StepView, value_N: Sequence[float]) -> list[float]:
    """[N] values with mean 0 and variance 1 over the response tokens of the step: long responses weigh more.

    The variance is the unbiased one of the tokens, plus 1e-8 (verl's masked_whiten).
    """
    counted = [index for group in step.groups for index in group]
    tokens = sum(step.length_N[index] for index in counted)
    if tokens < 2:
        return [0.0] * len(value_N)
    mean = sum(step.length_N[index] * value_N[index] for index in counted) / tokens
    squares = sum(step.length_N[index] * (value_N[index] - mean) ** 2 for index in counted)
    scale = 1 / math.sqrt(squares / (tokens - 1) + 1e-8)
    inside = set(counted)
    return [(value - mean) * scale if index in inside else 0.0 for index, value in enumerate(value_N)]
