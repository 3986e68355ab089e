"""AMPO: where all siblings fail, the solutions that the policy understands best replace some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Terms
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups, siblings
from owpo_megatron.methods.sampling.luffy import Luffy
from owpo_megatron.methods.surrogate import clipped_surrogate
from owpo_megatron.types import Group, Rollout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ampo(Luffy):
    """A group without one right answer gets the `teachers` solutions after whose reasoning the policy finds the answer
    most probable (the mean probability of its tokens), in place of as many random siblings. External tokens: p / (p +
    0.1) A; own ones: clipped at 0.2, with dual clip `dual` for A < 0. A = R - mean of all siblings / longest response.
    Source: the authors' code and run (SII-Enigma/AMPO)."""

    name = "ampo"
    summary = "S for own tokens, p / (p + 0.1) A for teachers' where all siblings fail"
    paper = "arXiv:2510.02227"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)
    dual: float = hyper(10.0, "Ratio beyond which a token with A < 0 has no gradient.", gt=1)
    teachers: int = hyper(2, "Most solutions in a group.", ge=1)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round == 0:
            return drawn_groups(view)
        if view.round > 1:
            return []
        failed = [index for index, group in enumerate(view.groups) if view.failed(group)]
        best = {index: self.understood(view, index) for index in failed}
        return [Ask(view.prompt(index), group=index, given=given) for index, given in best.items() if given]

    def understood(self, view: PlanView, index: int) -> tuple[Rollout, ...]:
        """The best solutions of a group's prompt, as responses."""
        assert view.solutions is not None
        prompt = view.prompt(index)
        solutions = view.solutions.solutions(prompt)
        probes = [view.solutions.answer_after(prompt, one) for one in solutions]
        looks = iter(view.statistics([probe for probe in probes if probe is not None]))
        scores = [0.0 if probe is None else _mean_probability(next(looks).logp_L) for probe in probes]
        order = sorted(range(len(solutions)), key=lambda place: -scores[place])
        count = min(self.teachers, view.group_size - 1)
        return tuple(view.solutions.expert(prompt, solutions[place]) for place in order[:count])

    def keep(self, view: PlanView) -> Sequence[Group]:
        kept = []
        for group in view.groups:
            experts = [place for place, one in enumerate(group.rollouts) if one.origin == "expert"]
            own = view.random.sample(range(view.group_size), view.group_size - len(experts))
            kept.append(siblings(group, [*sorted(own), *experts]) if experts else group)
        return kept

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        least_C = (self.dual * batch.advantage_C).where(batch.advantage_C < 0, surrogate.value_C)
        value_C = surrogate.value_C.maximum(least_C)
        if batch.external_C is not None:
            value_C = self.external(logp_C, batch).where(batch.external_C, value_C)
        return Terms(value_C, {"ratio_sum": surrogate.ratio_C, "clip_count": surrogate.clipped_C})


def _mean_probability(logp_L: Sequence[float]) -> float:
    return sum(map(math.exp, logp_L)) / max(len(logp_L), 1)
