"""Lp-Reg: improbable tokens of wrong answers are held up where a policy without its noise finds them plausible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.statistic import MinPLogProb, Statistic
from owpo_megatron.methods.surrogate import clipped_surrogate, k3

if TYPE_CHECKING:
    import torch

MOST = 10.0  # of k3 per token, as in verl: what is further away has no pull


@dataclass(frozen=True)
class LpReg(Method):
    """S; r A - β k3(π, proxy) on the least probable tokens with A < 0, where π < proxy.

    The proxy is π_old of the tokens with p >= κ times the largest p, normalised. The share is of the minibatch's tokens
    with A < 0, rounded down; the authors' code takes it per microbatch, and no token where it would be one.
    """

    name = "lp_reg"
    summary = "S; r A - β k3(π, min-p filtered π_old) on the least probable tokens with A < 0 that it raises"
    paper = "arXiv:2510.03222"
    coupling = "minibatch"

    clip_low: float = hyper(1.0, "Lower clip range of the ratio; 1: none.", gt=0, le=1)
    clip_high: float = hyper(9.0, "Upper clip range of the ratio.", gt=0)
    share: float = hyper(0.01, "Share of the minibatch's tokens with A < 0; 0.005 for 32B.", ge=0, le=1)
    kappa: float = hyper(0.02, "κ: smallest p of the proxy's tokens, as a share of the largest.", ge=0, le=1)
    beta: float = hyper(1.0, "Coefficient β of k3.", ge=0)

    @property
    def statistic(self) -> Statistic:
        return MinPLogProb(self.kappa)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        import torch

        logp_T = torch.cat([one.now_logp_L for one in samples])
        proxy_T = torch.cat([one.old_statistic_L for one in samples if one.old_statistic_L is not None])
        against_R = (torch.cat([one.advantage_L for one in samples]) < 0).nonzero()[:, 0]
        chosen_T = torch.zeros_like(logp_T, dtype=torch.bool)
        chosen_T[against_R[logp_T[against_R].sort(stable=True).indices[: int(self.share * len(against_R))]]] = True
        held_T = chosen_T & (logp_T < proxy_T)
        # that of a filtered token is -inf; beyond the bound k3 has no pull, and its exponential would overflow
        proxy_T = proxy_T.minimum(logp_T + 20).where(held_T, logp_T)
        lengths = [len(one.now_logp_L) for one in samples]
        columns = zip(held_T.to(logp_T.dtype).split(lengths), proxy_T.split(lengths), strict=True)
        return [{"held": held_L, "proxy": proxy_L} for held_L, proxy_L in columns]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        held_C = batch.given["held"] > 0
        ratio_C = (logp_C - batch.old_logp_C).exp()
        pull_C = k3(logp_C, batch.given["proxy"]).clamp(max=MOST)
        value_C = (ratio_C * batch.advantage_C - self.beta * pull_C).where(held_C, surrogate.value_C)
        metrics = policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C & ~held_C)
        return Terms(value_C, metrics | {"held_sum": held_C})
