"""d loss / d logp of any objective: all the head needs of a method.

A method's loss is a sum over tokens whose terms each depend on that token's log-prob alone (and on the batch): that is
what lets the gradients of the weights be formed chunk by chunk, in the forward.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from owpo_megatron.types import Objective, TokenBatch


@runtime_checkable
class GradientObjective(Objective, Protocol):
    """An objective that knows its derivative, so that no autograd graph is built for it."""

    def logp_gradient(self, logp_T: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """d loss_sum / d logp, [T]; exactly 0 where a token has no gradient."""


def logp_gradient(objective: Objective, logp_T: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """d loss_sum / d logp_T [T]: the objective's own, else by autograd through its few [T] vectors."""
    if isinstance(objective, GradientObjective):
        return objective.logp_gradient(logp_T, batch)
    with torch.enable_grad():
        leaf_T = logp_T.detach().requires_grad_()
        (gradient_T,) = torch.autograd.grad(objective(leaf_T, batch).loss_sum, leaf_T)
    return gradient_T
