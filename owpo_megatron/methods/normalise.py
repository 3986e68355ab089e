"""Group-normalised advantages.

Shapes: P prompts, G siblings of a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

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
