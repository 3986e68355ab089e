"""Clip-Cov and KL-Cov: tokens that lower the entropy most, by the covariance of A and log π, are held back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_ratio, clipped_surrogate

if TYPE_CHECKING:
    import torch


def covariances(samples: Sequence[SampleView]) -> torch.Tensor:
    """[T] (A - mean A) (log π - mean log π) of the minibatch's tokens, sample after sample."""
    import torch

    advantage_T = torch.cat([one.advantage_L for one in samples])
    logp_T = torch.cat([one.now_logp_L for one in samples])
    return (advantage_T - advantage_T.mean()) * (logp_T - logp_T.mean())


def marked(samples: Sequence[SampleView], chosen_T: torch.Tensor) -> list[dict[str, float | torch.Tensor]]:
    """`given` of a mask over the minibatch's tokens, as 1 and 0 under the name `chosen`."""
    lengths = [len(one.now_logp_L) for one in samples]
    return [{"chosen": own_L} for own_L in chosen_T.to(samples[0].now_logp_L.dtype).split(lengths)]


@dataclass(frozen=True)
class ClipCov(Method):
    """S; a random share of the tokens whose covariance is within [low, high], and that are not clipped, has none.

    As verl's `clip_cov`. The choice is seeded by the minibatch's number of tokens: the same on every rank.
    """

    name = "clip_cov"
    summary = "S, without a random share of the tokens with cov(A, log π) in [low, high]"
    paper = "arXiv:2505.22617"
    coupling = "minibatch"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)
    share: float = hyper(2e-4, "Share of the minibatch's tokens that is held back; at least one.", gt=0, le=1)
    low: float = hyper(1.0, "Smallest covariance of those tokens.")
    high: float = hyper(5.0, "Largest covariance of those tokens.")

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        import torch

        ratio_T = torch.cat([(one.now_logp_L - one.old_logp_L).exp() for one in samples])
        advantage_T, cov_T = torch.cat([one.advantage_L for one in samples]), covariances(samples)
        clipped_T = clipped_ratio(ratio_T, advantage_T, self.clip_low, self.clip_high).clipped_C
        candidates = ((cov_T > self.low) & (cov_T < self.high) & ~clipped_T).nonzero()[:, 0]
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(len(cov_T)))
        chosen_T = torch.zeros_like(clipped_T)
        chosen_T[candidates[order[: max(int(self.share * len(cov_T)), 1)]]] = True
        return marked(samples, chosen_T)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate, chosen_C = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high), batch.given["chosen"]
        metrics = policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C | (chosen_C > 0))
        return Terms(surrogate.value_C * (1 - chosen_C), metrics)


@dataclass(frozen=True)
class KlCov(Method):
    """r A; the share of the tokens with the largest covariance also pays β abs(log r). As verl's `kl_cov`: no clip."""

    name = "kl_cov"
    summary = "r A - β abs(log r) on the tokens with the largest cov(A, log π)"
    paper = "arXiv:2505.22617"
    coupling = "minibatch"

    share: float = hyper(2e-4, "Share of the minibatch's tokens that pays; at least one.", gt=0, le=1)
    beta: float = hyper(1.0, "Coefficient β of abs(log r).", ge=0)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        import torch

        cov_T = covariances(samples)
        most = cov_T.topk(max(int(self.share * len(cov_T)), 1)).indices
        return marked(samples, torch.zeros(len(cov_T), dtype=torch.bool).index_fill(0, most, True))

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        log_ratio_C, chosen_C = logp_C - batch.old_logp_C, batch.given["chosen"]
        ratio_C = log_ratio_C.exp()
        value_C = ratio_C * batch.advantage_C - self.beta * chosen_C * log_ratio_C.abs()
        metrics = policy_metrics(logp_C, batch, ratio_C.detach(), chosen_C < 0)  # no gradient is cut
        return Terms(value_C, metrics | {"paying": chosen_C})
