"""The 80/20 rule: the loss of the minibatch's most uncertain tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EntropyMask(Method):
    """DAPO's S on tokens whose entropy reaches the (1 - ρ) quantile of the minibatch, 0 on the others.

    Masked tokens stay in the divisor, and the quantile is interpolated, both as in TRL.
    """

    name = "entropy_mask"
    summary = "S on the share ρ of tokens with the highest entropy"
    paper = "arXiv:2506.01939"
    coupling = "minibatch"
    groups = "mixed"
    needs_entropy = True

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
    share: float = hyper(0.2, "Share ρ of the minibatch's tokens; 1: DAPO.", gt=0, le=1)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        import torch

        entropies = [one.entropy_L for one in samples if one.entropy_L is not None]
        ordered_T = torch.cat(entropies).sort().values  # torch.quantile takes no more than 16 million
        place = (1 - self.share) * (len(ordered_T) - 1)
        below, above = ordered_T[int(place)], ordered_T[min(int(place) + 1, len(ordered_T) - 1)]
        least = below + (place - int(place)) * (above - below)
        return [{"kept": (entropy_L >= least).to(entropy_L.dtype)} for entropy_L in entropies]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        kept_C, surrogate = batch.given["kept"], clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        metrics = policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C)
        return Terms(surrogate.value_C * kept_C, metrics | {"kept_sum": kept_C})
