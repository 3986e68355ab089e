"""SimPO: right answers are preferred to wrong ones by a margin of their mean log-probs, without a reference."""

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
class SimPO(Contrast):
    """log σ(β (s_right - s_wrong) - γ), s = mean log π; the mean over all pairs of a right and a wrong sibling.

    Pairs come from the verifier instead of a preference data set. Groups of one kind are worth 0 and count in the mean.
    """

    name = "simpo"
    summary = "log σ(β (s - s') - γ) over pairs of a right and a wrong answer, s = mean log π"
    paper = "arXiv:2405.14734"
    needs_old = False

    beta: float = hyper(2.0, "Scale β of the difference.", gt=0)
    gamma: float = hyper(1.0, "Margin γ.", ge=0)

    def of_group(self, logps: list[torch.Tensor], group: Sequence[SampleView]) -> torch.Tensor:
        import torch

        score_G, right_G = torch.stack([logp_L.mean() for logp_L in logps]), right_of(group)
        if right_G.all() or not right_G.any():
            return 0 * score_G.sum()
        margin_RW = self.beta * (score_G[right_G][:, None] - score_G[~right_G]) - self.gamma
        return torch.nn.functional.logsigmoid(margin_RW).mean()
