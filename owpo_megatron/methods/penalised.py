"""The clipped surrogate minus a k3 penalty: the per-token value that GRPO and Sym-DAPO share."""

from __future__ import annotations

import torch

from owpo_megatron.methods.metrics import policy_metrics, reference_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate, k3, surrogate_push
from owpo_megatron.types import TokenBatch


def penalised_surrogate(
    logp_T: torch.Tensor, batch: TokenBatch, clip_low: float, clip_high: float, beta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(min(r A, clip(r) A) - beta k3(logp, ref_logp), metrics); with beta 0 the reference is never read."""
    surrogate = clipped_surrogate(logp_T, batch, clip_low, clip_high)
    metrics = policy_metrics(logp_T, batch, surrogate.ratio_T, surrogate.clipped_T)
    if beta == 0:
        return surrogate.value_T, metrics
    # d k3 / d logp = 1 - exp(ref - logp): the pull-back that may outweigh the verifier's direction
    pull_T = beta * (1 - torch.exp(batch.ref_logp_T - logp_T.detach()))
    push_T = surrogate_push(surrogate, batch.advantage_T) - pull_T
    metrics |= reference_metrics(logp_T, batch, torch.ones_like(batch.mask_T), push_T)
    return surrogate.value_T - beta * k3(logp_T, batch.ref_logp_T), metrics
