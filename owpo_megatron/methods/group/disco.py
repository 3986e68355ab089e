"""DisCO and DRPO: right answers against wrong ones, without a clip; a constraint holds the policy near the old one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.group.contrast import Contrast, right_of
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import SampleView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Disco(Contrast):
    """mean over right answers of s - τ log mean over wrong ones of exp(s / τ), minus sg(max(β (KL - δ), 0)) KL.

    s is a response's mean log π ("log L"); KL the mean over the group's tokens of r - 1 - log r. A group of one kind
    has the constraint alone. As the authors' code, whose other score is `disco_ratio`.
    """

    name = "disco"
    summary = "right answers' s - τ log mean exp(s / τ) of wrong ones, s = mean log π"
    paper = "arXiv:2505.12366"

    tau: float = hyper(10.0, "Temperature τ of the wrong answers.", gt=0)
    beta: float = hyper(1e3, "Slope β of the constraint's hinge.", ge=0)
    delta: float = hyper(1e-4, "Allowed KL to the old policy, δ.", ge=0)

    def score(self, logp_L: torch.Tensor, one: SampleView) -> torch.Tensor:
        return logp_L.mean()

    def share(self, right: Sequence[SampleView]) -> list[float]:
        """Weights of the right answers; they sum to 1."""
        return [1 / len(right)] * len(right)

    def of_group(self, logps: list[torch.Tensor], group: Sequence[SampleView]) -> torch.Tensor:
        import torch

        log_ratio_T = torch.cat(logps) - torch.cat([one.old_logp_L for one in group])
        kl = (log_ratio_T.exp() - 1 - log_ratio_T).mean()
        total = -(self.beta * (kl - self.delta)).clamp(min=0).detach() * kl
        right_G = right_of(group)
        if right_G.all() or not right_G.any():
            return total
        score_G = torch.stack([self.score(logp_L, one) for logp_L, one in zip(logps, group, strict=True)])
        wrong = (score_G[~right_G] / self.tau).logsumexp(0) - math.log(int((~right_G).sum()))
        share = score_G.new_tensor(self.share([one for one in group if one.reward > 0]))
        return total + (share * score_G[right_G]).sum() - self.tau * wrong


@dataclass(frozen=True)
class DiscoRatio(Disco):
    """The same with a response's mean ratio as s ("L ratio")."""

    name = "disco_ratio"
    summary = "as disco, s = mean r"

    tau: float = hyper(1.0, "Temperature τ of the wrong answers.", gt=0)

    def score(self, logp_L: torch.Tensor, one: SampleView) -> torch.Tensor:
        return (logp_L - one.old_logp_L).exp().mean()


@dataclass(frozen=True)
class Drpo(Disco):
    """DisCO whose right answers weigh exp((1 - L / L_max) / λ), normalised among themselves: short ones count more."""

    name = "drpo"
    summary = "as disco, right answers weighted by exp(-L / (λ L_max))"
    paper = "arXiv:2510.04474"

    scale: float = hyper(0.1, "λ: the smaller, the more short answers are preferred.", gt=0)
    max_length: int = hyper(8192, "L_max; set it to rollout.max_response_tokens.", ge=1)

    def share(self, right: Sequence[SampleView]) -> list[float]:
        weights = [math.exp((1 - len(one.now_logp_L) / self.max_length) / self.scale) for one in right]
        return [weight / sum(weights) for weight in weights]
