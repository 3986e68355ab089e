"""RL-PLUS: an expert's solution in each group, with a mixture ratio and more advantage for improbable tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch
from owpo_megatron.methods.sampling.luffy import Luffy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RlPlus(Luffy):
    """External tokens: 2 pi / (old + (old + 1) / 2) A sg(1 - pi)^power; the rest is LUFFY's (own tokens r A without a
    clip, A = R - mean over all siblings / longest response). Source: the authors' code and run (YihongDong/RL-PLUS)."""

    name = "rl_plus"
    summary = "r A for own tokens, 2 π / (old + (old + 1) / 2) sg(1 - π)^½ A for an expert's"
    paper = "arXiv:2508.00222"

    power: float = hyper(0.5, "Exponent of 1 - pi, which weighs improbable tokens up.", ge=0)

    def external(self, logp_C: torch.Tensor, batch: ChunkBatch) -> torch.Tensor:
        """Value of tokens that an expert wrote."""
        p_C, old_C = logp_C.exp(), batch.old_logp_C.exp()
        improbable_C = (1 - p_C.detach()).clamp(min=0) ** self.power
        return 2 * p_C / (old_C + (old_C + 1) / 2) * improbable_C * batch.advantage_C
