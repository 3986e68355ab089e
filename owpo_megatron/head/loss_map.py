"""The nine methods as one elementwise map on a GPU: what autograd does for an objective in some fifty small kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from owpo_megatron.head import triton_ops
from owpo_megatron.types import Objective, ObjectiveOut, TokenBatch

_DEVIATIONS = {"none": 0, "one_way": 1, "no_asym": 2, "no_locking": 3, "no_accel": 4}
_SUMS = ("loss", "tokens", "ratio", "clipped", "w", "log_ratio_to_reference")


@dataclass(frozen=True)
class LossMap:
    """Per-token loss, derivative and sums of a method, in one kernel.

    Args:
        surrogate: the clipped surrogate; False: distillation (opd, mopd), whose value is push * logp.
        deviation: how w depends on the directional deviation: "none" (w = 1), "one_way" (owpo) or an ablation.
        sample_mean: each token weighs 1 / tokens of its sample; False: 1.
        beta: of the k3 penalty. alpha: of the advantage in mopd.
    """

    surrogate: bool = True
    deviation: Literal["none", "one_way", "no_asym", "no_locking", "no_accel"] = "none"
    sample_mean: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.28
    weight_low: float = 0.8
    weight_high: float = 1.2
    beta: float = 0.0
    alpha: float = 0.0

    def __call__(
        self, logp_T: torch.Tensor, batch: TokenBatch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(loss [T], d loss / d logp [T], sums over response tokens), in float32; sums are added in a fixed order."""
        inputs = [
            logp_T.float(), batch.old_logp_T.float(), batch.ref_logp_T.float(), batch.advantage_T.float(),
            batch.active_T.to(torch.int32), batch.mask_T.to(torch.int32), self._weight_per_token(batch),
        ]  # fmt: skip
        limits = [self.clip_low, self.clip_high, self.weight_low, self.weight_high, self.beta, self.alpha]
        reads_reference = self.deviation != "none" or self.beta != 0 or not self.surrogate
        loss_T, dlogp_T, sums_B6 = triton_ops.loss_map(
            inputs, limits, self.surrogate, _DEVIATIONS[self.deviation], reads_reference, self.beta != 0
        )
        return loss_T, dlogp_T, dict(zip(_SUMS, sums_B6.double().sum(0).unbind(0), strict=True))

    def _weight_per_token(self, batch: TokenBatch) -> torch.Tensor:
        given_T = torch.ones_like(batch.advantage_T) if batch.weight_T is None else batch.weight_T
        if not self.sample_mean:
            return given_T.float()
        sample_T = batch.sample_T.masked_fill(~batch.mask_T, 0)
        count_S = torch.zeros(batch.num_samples, dtype=torch.int64, device=sample_T.device)
        count_S = count_S.index_add(0, sample_T, batch.mask_T.to(torch.int64))
        return given_T.float() / count_S[sample_T].clamp(min=1).float()


class FusedObjective:
    """An objective whose derivative comes from its map: a GradientObjective. Loss and metrics stay the objective's."""

    def __init__(self, objective: Objective, loss_map: LossMap):
        self._objective, self._loss_map = objective, loss_map
        self.needs_reference = objective.needs_reference
        self.needs_old = objective.needs_old
        self.dynamic_sampling = objective.dynamic_sampling

    def __call__(self, logp_T: torch.Tensor, batch: TokenBatch) -> ObjectiveOut:
        return self._objective(logp_T, batch)

    def logp_gradient(self, logp_T: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        return self._loss_map(logp_T, batch)[1]
