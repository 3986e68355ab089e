"""Truncated importance sampling: the engine that drew the tokens is not quite the trainer's policy.

Engine and trainer compute the same weights' probabilities with other kernels, sometimes in another precision. The
factor min(pi_old(trainer) / pi(engine), cap), detached, corrects the expectation for that; the cap bounds its variance.

Source: Ionides 2008 (truncated weights); Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
RL training" (the engine mismatch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from owpo_megatron.types import Objective, ObjectiveOut, ReferenceNeed, TokenBatch


@dataclass(frozen=True)
class TruncatedImportance:
    """Any method with each token's loss times min(exp(old_logp - behaviour_logp), cap): an Objective itself.

    The ratio and clip of the method stay between the current and the old policy of the trainer; the factor stands
    between the old policy and the engine. With an engine that agrees it is 1 and changes nothing. Penalties (k3) are
    scaled too: they are means over the same samples.

    Metrics added (sums over response tokens): `tis_sum` of the factor, `tis_capped` counts those that the cap cut.
    """

    objective: Objective
    cap: float

    @property
    def needs_reference(self) -> ReferenceNeed:
        return self.objective.needs_reference

    @property
    def needs_old(self) -> bool:
        return self.objective.needs_old

    @property
    def dynamic_sampling(self) -> bool:
        return self.objective.dynamic_sampling

    def __call__(self, logp_T: torch.Tensor, batch: TokenBatch) -> ObjectiveOut:
        assert batch.behaviour_logp_T is not None, "the engine's log-probs are needed"
        ratio_T = torch.exp(batch.old_logp_T.detach() - batch.behaviour_logp_T)
        factor_T = ratio_T.clamp(max=self.cap)
        out = self.objective(logp_T, replace(batch, weight_T=factor_T))
        sums = {
            "tis_sum": factor_T.double().masked_fill(~batch.mask_T, 0).sum(),
            "tis_capped": ((ratio_T > self.cap) & batch.mask_T).sum().double(),
        }
        return replace(out, metrics=out.metrics | sums)
