"""PACS: the verdict is the label, the policy's own leave-one-out score the logit of a cross-entropy."""

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
class Pacs(Contrast):
    """-cross-entropy of the verdict given the logit s - mean of the others' s, with s = β Σ (log π - log π_old).

    The mean over responses. `balanced` weighs right and wrong answers of a mixed group equally, as the authors'
    `question` weights.
    """

    name = "pacs"
    summary = "-cross-entropy of the verdict given s - mean of the other s, s = β Σ log r"
    paper = "arXiv:2509.02522"

    beta: float = hyper(1.0, "Scale β of the score.", gt=0)
    balanced: bool = hyper(False, "Weigh both classes of a group equally.")

    def of_group(self, logps: list[torch.Tensor], group: Sequence[SampleView]) -> torch.Tensor:
        import torch

        sums = [(logp_L - one.old_logp_L).sum() for logp_L, one in zip(logps, group, strict=True)]
        score_G, right_G = self.beta * torch.stack(sums), right_of(group)
        others = max(len(group) - 1, 1)
        logit_G = score_G - (score_G.sum() - score_G) / others
        weight_G = torch.ones_like(score_G)
        if self.balanced and right_G.any() and not right_G.all():
            share_G = right_G.to(score_G.dtype).mean() * right_G + (~right_G).to(score_G.dtype).mean() * ~right_G
            weight_G = 1 / (2 * share_G)
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return -loss(logit_G, right_G.to(score_G.dtype), weight=weight_G)
