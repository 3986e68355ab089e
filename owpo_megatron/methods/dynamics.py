"""Gradient weight of a method as the policy moves away from its reference: the curves of the paper's Figure 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from owpo_megatron.methods.method import ChunkBatch, Method

if TYPE_CHECKING:
    import torch


def effective_progress(method: Method, delta_D: torch.Tensor, advantage: float) -> torch.Tensor:
    """g(delta): the method's gradient of a token's log-prob, as a multiple of the plain policy gradient's A.

    At the start of an update (ratio 1), through the method itself, not a formula of it. g = 1: the verifier's push
    unchanged; g < 0: the update goes against the verifier (force reversal).

    Args:
        delta_D: directional deviations sgn(A) (logp - ref_logp) (paper, Eq. 5); positive is ahead of the reference.
        advantage: A, not 0.

    Source: One-Way Policy Optimization (arXiv:2605.22156), section 4.
    """
    import torch

    assert advantage != 0, "without an advantage there is no direction"
    delta_D = delta_D.double()
    logp_D = torch.full_like(delta_D, -1.0).requires_grad_()
    sign = 1.0 if advantage > 0 else -1.0
    batch = ChunkBatch(
        old_logp_C=logp_D.detach(),
        ref_logp_C=logp_D.detach() - sign * delta_D,
        advantage_C=torch.full_like(delta_D, advantage),
        active_C=torch.ones_like(delta_D, dtype=torch.bool),
    )
    (gradient_D,) = torch.autograd.grad(method.terms(logp_D, batch).value_C.sum(), logp_D)
    return gradient_D / advantage
