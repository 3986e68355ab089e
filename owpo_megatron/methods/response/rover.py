"""ROVER: the policy's log-ratio as the Q-values of a uniformly random policy, by regression instead of a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, StepView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.normalise import centred, in_groups
from owpo_megatron.methods.statistic import MeanLogProb, Statistic

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rover(Method):
    """-(Q - target)², Q = ρ log r, target = R - mean + γ times the mean over the vocabulary of Q at the next token.

    The target has no gradient; behind a response's last token Q is 0. As the authors' code for Countdown, and the
    paper: its recipe for mathematics has 5 (1 - share of right answers) and -2 (1 - share of wrong ones) of the batch
    in place of R - mean. They draw at a temperature of 1, and of 0.6 in mathematics.
    """

    name = "rover"
    summary = "-(Q - (R - mean + γ · mean over the vocabulary of the next token's Q))², Q = ρ log r"
    paper = "arXiv:2509.24981"
    coupling = "sample"
    needs_exact_head = True

    rho: float = hyper(1.0, "Scale ρ of Q.", gt=0)
    gamma: float = hyper(1.0, "Weight γ of the next token's mean Q; 0: regression on R - mean.", ge=0)

    @property
    def statistic(self) -> Statistic:
        return MeanLogProb()

    def advantages(self, step: StepView) -> list[float]:
        return in_groups(step, centred)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        import torch

        given: list[dict[str, float | torch.Tensor]] = []
        for one in samples:
            assert one.now_statistic_L is not None and one.old_statistic_L is not None
            mean_q_L = self.rho * (one.now_statistic_L - one.old_statistic_L)
            next_L = torch.cat([mean_q_L[1:], torch.zeros_like(mean_q_L[:1])])
            given.append({"next_q": next_L, "target": one.advantage_L + self.gamma * next_L})
        return given

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        log_ratio_C, target_C = logp_C - batch.old_logp_C, batch.given["target"]
        metrics = policy_metrics(logp_C, batch, log_ratio_C.detach().exp(), target_C != target_C)  # nothing is clipped
        return Terms(-(self.rho * log_ratio_C - target_C).square(), metrics | {"next_q": batch.given["next_q"]})
