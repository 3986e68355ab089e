"""BAPO: clip bounds that move, minibatch by minibatch, until right answers carry their share of the surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Bapo(Method):
    """min(r A, clip(r, low, high) A), at least c A for A < 0.

    First low, then high rises in steps until the sum of positive contributions reaches `target` times that of negative
    ones, or the limit; contributions are min(r, high) A for A >= 0 and max(r, low) A for A < 0. As the authors' code,
    with the numbers of their example; their general default of `target` is 1.
    """

    name = "bapo"
    summary = "S with bounds raised until right answers carry their share; at least c A for A < 0"
    paper = "arXiv:2510.18927"
    coupling = "minibatch"

    low_start: float = hyper(0.8, "Lower bound of the ratio at first.", gt=0, lt=1)
    low_most: float = hyper(0.95, "Largest lower bound.", gt=0, le=1)
    high_start: float = hyper(1.2, "Upper bound of the ratio at first.", gt=1)
    high_most: float = hyper(2.0, "Largest upper bound.", gt=1)
    step: float = hyper(0.05, "Step of both bounds.", gt=0)
    target: float = hyper(0.5, "Wanted ratio of positive to negative contributions.", ge=0)
    cap: float = hyper(3.0, "Largest ratio c of tokens with A < 0.", gt=1)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        import torch

        ratio_T = torch.cat([(one.now_logp_L - one.old_logp_L).exp() for one in samples])
        low, high = self.bounds(ratio_T, torch.cat([one.advantage_L for one in samples]))
        return [{"low": low, "high": high} for _ in samples]

    def bounds(self, ratio_T: torch.Tensor, advantage_T: torch.Tensor) -> tuple[float, float]:
        """(low, high) for the tokens of a minibatch."""

        def is_met() -> bool:
            positive = (ratio_T.clamp(max=high) * advantage_T.clamp(min=0)).double().sum()
            negative = -(ratio_T.clamp(min=low) * advantage_T.clamp(max=0)).double().sum()
            return bool(negative <= 0) or bool(positive >= self.target * negative)

        low, high = self.low_start, self.high_start
        while low < self.low_most and not is_met():
            low = min(low + self.step, self.low_most)
        while high < self.high_most and not is_met():
            high = min(high + self.step, self.high_most)
        return low, high

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        low_C, high_C, advantage_C = batch.given["low"], batch.given["high"], batch.advantage_C
        ratio_C = (logp_C - batch.old_logp_C).exp()
        value_C = (ratio_C * advantage_C).minimum(ratio_C.clamp(low_C, high_C) * advantage_C)
        value_C = value_C.maximum(self.cap * advantage_C).where(advantage_C < 0, value_C)
        ratio_C = ratio_C.detach()
        outside_C = ((ratio_C < low_C) | (ratio_C > self.cap)) & (advantage_C < 0)
        metrics = policy_metrics(logp_C, batch, ratio_C, outside_C | (ratio_C > high_C) & (advantage_C > 0))
        return Terms(value_C, metrics | {"bound_low": low_C, "bound_high": high_C})
