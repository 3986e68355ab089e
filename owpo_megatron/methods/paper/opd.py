"""OPD, on-policy distillation: reverse KL to a fixed teacher on the policy's own samples, without a verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import every_row, policy_metrics, reference_metrics

if TYPE_CHECKING:
    import torch


def distillation(logp_C: torch.Tensor, batch: ChunkBatch, clip_low: float, clip_high: float, alpha: float) -> Terms:
    """sg(r) sg(ref_logp - logp + alpha A) logp (paper, Eq. 3 and 4).

    A token whose ratio r leaves [1 - clip_low, 1 + clip_high] is dropped: it stays in the sample's token count and
    adds nothing. The value has no meaning of its own; its gradient is the policy gradient.
    """
    current_C = logp_C.detach()
    ratio_C = (current_C - batch.old_logp_C).exp()
    cut_C = (ratio_C < 1 - clip_low) | (ratio_C > 1 + clip_high)
    push_C = ratio_C * (batch.ref_logp_C - current_C + alpha * batch.advantage_C)
    push_C = push_C.masked_fill(cut_C, 0)
    metrics = policy_metrics(logp_C, batch, ratio_C, cut_C)
    return Terms(push_C * logp_C, metrics | reference_metrics(logp_C, batch, every_row(batch), push_C))


@dataclass(frozen=True)
class Opd(Method):
    """sg(r) sg(ref_logp - logp) logp: the advantage is not used.

    With `vocabulary: full` the value of a token is -KL(policy || teacher) over the whole vocabulary at its place, with
    its exact gradient (GKD, arXiv:2306.13649, reverse KL on the policy's own samples). Without a ratio and a clip: the
    places are taken as they were drawn. At r = 1 the sampled form has this gradient as its mean over tokens.
    """

    name = "opd"
    summary = "sg(r) sg(-z) log π"
    paper = "OWPO B.3"
    divisor = "samples"
    reference = "teacher"
    refresh = "fixed"
    uses_rewards = False
    needs_exact_head = True
    max_teachers = 1

    clip_low: float = hyper(0.2, "A token with a ratio below 1 - clip_low is dropped.", gt=0, lt=1)
    clip_high: float = hyper(0.28, "A token with a ratio above 1 + clip_high is dropped.", gt=0)
    vocabulary: str = hyper(
        "sampled",
        "Tokens of the KL: the sampled one, or full, the whole vocabulary (no clip; needs the teacher's weights).",
        choices=("sampled", "full"),
    )

    @property
    def whole_vocabulary(self) -> bool:
        return self.vocabulary == "full"

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        if not self.whole_vocabulary:
            return distillation(logp_C, batch, self.clip_low, self.clip_high, alpha=0.0)
        ratio_C = (logp_C.detach() - batch.old_logp_C).exp()
        metrics = policy_metrics(logp_C, batch, ratio_C, ~every_row(batch))  # nothing is cut
        metrics |= reference_metrics(logp_C, batch, every_row(batch), batch.ref_logp_C - logp_C.detach())
        del metrics["reversed_count"]  # no single token is pushed
        return Terms(logp_C * 0, metrics, kl_coef_C=-logp_C.new_ones(logp_C.shape))
