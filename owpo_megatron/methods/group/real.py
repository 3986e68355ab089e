"""REAL: rewards as labels of a classification of the siblings by their log-ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.group.contrast import Contrast, right_of
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import SampleView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Real(Contrast):
    """-log(1 + Σ right exp(-s / τ)) - log(1 + Σ wrong exp(s / τ)), s the mean log-ratio of a response.

    The 1 is an anchor of logit 0. Groups of one kind are worth 0 and count in the mean. As ms-swift's `real`.
    """

    name = "real"
    summary = "-log(1 + Σ exp(-s / τ) of right) - log(1 + Σ exp(s / τ) of wrong), s = mean log r"
    paper = "arXiv:2602.05630"

    tau: float = hyper(0.5, "Temperature τ.", gt=0)

    def of_group(self, logps: list[torch.Tensor], group: Sequence[SampleView]) -> torch.Tensor:
        import torch

        scores = [(logp_L - one.old_logp_L).mean() for logp_L, one in zip(logps, group, strict=True)]
        score_G, right_G = torch.stack(scores) / self.tau, right_of(group)
        if right_G.all() or not right_G.any():
            return 0 * score_G.sum()
        anchor = score_G.new_zeros(1)
        return -torch.cat([-score_G[right_G], anchor]).logsumexp(0) - torch.cat([score_G[~right_G], anchor]).logsumexp(
            0
        )
