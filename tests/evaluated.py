"""A method on a few responses, in float64 and without a head: its loss and the gradient of every log-prob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from owpo_megatron.methods import Method, dense_loss
from owpo_megatron.methods.prepare import prepared_in_microbatch
from owpo_megatron.types import TokenBatch


@dataclass(frozen=True)
class Response:
    """All numbers per token, or one for all of them."""

    now: Sequence[float]
    old: Sequence[float] | float
    advantage: Sequence[float] | float = 1.0
    reward: float = 0.0
    group: int = 0
    entropy: Sequence[float] | float = 0.0
    ref: Sequence[float] | float = 0.0
    statistic: Sequence[float] | float = 0.0  # of the current policy, for methods that ask for one
    old_statistic: Sequence[float] | float = 0.0
    active: bool = True


@dataclass(frozen=True)
class Evaluated:
    loss: float  # divided
    gradients: list[list[float]] = field(default_factory=list)  # of the loss that is maximised, not divided
    metrics: dict[str, float] = field(default_factory=dict)


def evaluate(method: Method, responses: Sequence[Response]) -> Evaluated:
    """The value (to be maximised) over its count, and d value sum / d log-prob of each response's tokens."""

    def column(name: str) -> torch.Tensor:
        parts = []
        for one in responses:
            value = getattr(one, name)
            parts += list(value) if isinstance(value, (list, tuple)) else [float(value)] * len(one.now)
        return torch.tensor(parts, dtype=torch.float64)

    lengths = [len(one.now) for one in responses]
    now_T, entropy_T = column("now"), column("entropy")
    batch = TokenBatch(
        old_logp_T=column("old"),
        ref_logp_T=column("ref"),
        advantage_T=column("advantage"),
        active_T=torch.tensor([one.active for one in responses]).repeat_interleave(torch.tensor(lengths)),
        mask_T=torch.ones(len(now_T), dtype=torch.bool),
        sample_T=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        num_samples=len(lengths),
        old_statistic_T=column("old_statistic"),
        behaviour_logp_T=column("old"),
        reward_S=torch.tensor([one.reward for one in responses]),
        group_S=torch.tensor([one.group for one in responses]),
    )
    if method.coupling != "token":
        statistic_T = column("statistic") if method.statistic else None
        batch = prepared_in_microbatch(method, batch, now_T, entropy_T, statistic_T)
    leaf_T = now_T.clone().requires_grad_()
    loss = dense_loss(method, leaf_T, batch, entropy_T)
    gradient_T = torch.zeros_like(now_T)
    if loss.loss_sum.requires_grad:
        (gradient_T,) = torch.autograd.grad(-loss.loss_sum, leaf_T)
    return Evaluated(
        float(-loss.loss_sum.detach()) / int(loss.count),
        [part.tolist() for part in gradient_T.split(lengths)],
        {name: float(value.sum()) for name, value in loss.metrics.items()},
    )


def of_ratio(
    method: Method, ratio: float, advantage: float, old: float = -1.0, entropy: float = 0.0
) -> tuple[float, float]:
    """(value, gradient) of a single token with this ratio, as a response of its own."""
    import math

    found = evaluate(method, [Response([old + math.log(ratio)], old, advantage, entropy=entropy)])
    return found.loss, found.gradients[0][0]
