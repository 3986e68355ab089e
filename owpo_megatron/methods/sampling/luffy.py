"""LUFFY: one sibling of each group is an expert's solution, whose improbable tokens weigh most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, StepView, Terms
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups
from owpo_megatron.methods.sampling.base import minus_mean

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Luffy(Method):
    """Own tokens: r A, no clip; external ones: f A with f = p / (p + shape), p the policy's probability. A = R - mean
    over all siblings, divided by the longest response, summed over tokens. The expert takes one sibling's place; a
    prompt without a solution has own siblings only. Source: the authors' code and run (ElliottYan/LUFFY)."""

    name = "luffy"
    summary = "r A for own tokens, p / (p + 0.1) A for an expert's"
    paper = "arXiv:2504.14945"
    kind = "sampling"
    divisor = "sample_sums"
    needs_solutions = True
    takes_episodes = False

    shape: float = hyper(0.1, "Probability at which an external token's weight is 1/2.", gt=0)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        return [with_expert(view, ask) for ask in drawn_groups(view)]

    def advantages(self, step: StepView) -> Sequence[float]:
        return [value / max(step.max_length, 1) for value in minus_mean(step)]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C = (logp_C - batch.old_logp_C).exp()
        value_C = ratio_C * batch.advantage_C
        if batch.external_C is not None:
            value_C = self.external(logp_C, batch).where(batch.external_C, value_C)
        return Terms(value_C, {"ratio_sum": ratio_C.detach()})

    def external(self, logp_C: torch.Tensor, batch: ChunkBatch) -> torch.Tensor:
        """Value of tokens that an expert wrote."""
        p_C = logp_C.exp()
        return p_C / (p_C + self.shape) * batch.advantage_C


def with_expert(view: PlanView, ask: Ask) -> Ask:
    """The ask with one sibling replaced by the prompt's first solution, where it has one."""
    assert view.solutions is not None
    solutions = view.solutions.solutions(ask.prompt)
    if not solutions:
        return ask
    return Ask(ask.prompt, ask.siblings - 1, given=(view.solutions.expert(ask.prompt, solutions[0]),))
