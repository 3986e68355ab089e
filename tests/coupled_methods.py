"""Methods whose tokens depend on each other, one for each coupling, and one that breaks its declaration.

Each has a dense form beside it, written once more on complete log-probs that carry the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from owpo_megatron.methods import (
    ChunkBatch,
    Method,
    SampleView,
    Terms,
    catalogue,
    hyper,
    hyper_parameters,
    linear_terms,
    make_method,
    slopes,
)
from owpo_megatron.methods.statistic import MeanLogProb


@dataclass(frozen=True)
class SequenceRatio(Method):
    """GSPO's: one clipped ratio per response."""

    name = "sequence_ratio"
    summary = "min(s A, clip(s) A), s the geometric mean of a response's ratios"
    coupling = "sample"
    divisor = "samples"
    clip_low: float = hyper(0.1, "Lower clip range.", gt=0, lt=1)
    clip_high: float = hyper(0.15, "Upper clip range.", gt=0)

    def prepare(self, samples: Sequence[SampleView]) -> list[Mapping[str, float | torch.Tensor]]:
        return [{"drift": (one.now_logp_L - one.old_logp_L).mean(), "now": one.now_logp_L} for one in samples]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C = (batch.given["drift"] + logp_C - batch.given["now"]).exp()
        bounded_C = ratio_C.clamp(1 - self.clip_low, 1 + self.clip_high)
        value_C = (ratio_C * batch.advantage_C).minimum(bounded_C * batch.advantage_C)
        return Terms(value_C, {"ratio_sum": ratio_C.detach()})


@dataclass(frozen=True)
class RightAgainstWrong(Method):
    """DisCO's log-likelihood form, over each group."""

    name = "right_against_wrong"
    summary = "mean over right answers of s - tau log mean over wrong ones of exp(s / tau)"
    coupling = "group"
    divisor = "sample_sums"
    needs_old = False
    tau: float = hyper(2.0, "Temperature of the wrong answers.", gt=0)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        out: dict[int, dict[str, float | torch.Tensor]] = {}
        for group in sorted({one.group for one in samples}):
            indices = [index for index, one in enumerate(samples) if one.group == group]
            rewards = [samples[index].reward for index in indices]

            def total(logps: list[torch.Tensor], rewards: list[float] = rewards) -> torch.Tensor:
                return self.objective(logps, rewards)

            out |= dict(zip(indices, slopes([samples[index] for index in indices], total), strict=True))
        return [out[index] for index in range(len(samples))]

    def objective(self, logps: list[torch.Tensor], rewards: list[float]) -> torch.Tensor:
        score = torch.stack([logp_L.mean() for logp_L in logps])
        right = torch.tensor(rewards) > 0
        if right.all() or not right.any():
            return 0 * score.sum()
        wrong = (score[~right] / self.tau).exp().mean().log() * self.tau
        return (score[right] - wrong).mean()

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return linear_terms(logp_C, batch)


@dataclass(frozen=True)
class UncertainTokens(Method):
    """The policy gradient on the most uncertain half of the minibatch's tokens."""

    name = "uncertain_tokens"
    summary = "A r on the tokens with the highest entropy"
    coupling = "minibatch"
    needs_entropy = True
    share: float = hyper(0.5, "Share of the minibatch's tokens.", gt=0, le=1)

    def prepare(self, samples: Sequence[SampleView]) -> list[Mapping[str, float | torch.Tensor]]:
        every = torch.cat([one.entropy_L for one in samples if one.entropy_L is not None])
        least = every.sort(descending=True).values[max(round(self.share * len(every)), 1) - 1]
        return [{"kept": (one.entropy_L >= least).to(every.dtype)} for one in samples if one.entropy_L is not None]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C = (logp_C - batch.old_logp_C).exp()
        return Terms(ratio_C * batch.advantage_C * batch.given["kept"], {"kept_sum": batch.given["kept"]})


@dataclass(frozen=True)
class Narrowing(Method):
    """A r, weighed by how much mean log-prob the vocabulary has lost: a statistic that `terms` reads itself."""

    name = "narrowing"
    summary = "A r exp(old mean log p - mean log p)"

    @property
    def statistic(self) -> MeanLogProb:
        return MeanLogProb()

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        assert batch.statistic_C is not None and batch.old_statistic_C is not None
        lost_C = (batch.old_statistic_C - batch.statistic_C).clamp(-1, 1)
        return Terms((logp_C - batch.old_logp_C).exp() * batch.advantage_C * lost_C.exp(), {"kept_sum": lost_C})


@dataclass(frozen=True)
class Deceived(Method):
    """Declares `token` and centres its log-probs over whatever rows it is handed."""

    name = "deceived"
    summary = "A (log pi - its mean)"

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return Terms(batch.advantage_C * (logp_C - logp_C.mean()))


NINE = ("dapo", "grpo", "mopd", "opd", "owpo", "owpo_no_accel", "owpo_no_asym", "owpo_no_locking", "sym_dapo")
"""The methods that the paper compares."""


FEW_TOKENS = {"lp_reg": {"share": 0.5}}
"""Settings of methods that would do nothing on a few tokens."""


def distinct_objectives() -> list[Method]:
    """One method of the catalogue for each objective: those that differ in their advantages alone share theirs.

    For tests of the head and of ranks, where advantages are given and every method costs time.
    """
    found: dict[tuple[object, ...], Method] = {}
    for method in catalogue().values():
        own = make_method(method, **FEW_TOKENS.get(method.name, {}))
        settings = tuple((name, getattr(own, name)) for name in hyper_parameters(method))
        shares = settings if own.kind == "objective" else ()
        key = (method.terms, method.prepare, own.divisor, own.needs_reference, own.groups, shares)
        key = key if own.kind == "objective" else (method.terms, method.prepare, own.divisor)
        found.setdefault(key, own)
    return list(found.values())


COUPLED: tuple[Method, ...] = (SequenceRatio(), RightAgainstWrong(), UncertainTokens(), Narrowing())
