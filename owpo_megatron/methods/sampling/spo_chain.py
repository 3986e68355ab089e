"""SPO-chain, segment policy optimisation: continuations from cuts of a response give its segments advantages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups
from owpo_megatron.methods.sampling.base import Sampled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SpoChain(Sampled):
    """A of a segment = V(its end) - V(its start). V of a prefix is the mean reward of `continuations` responses from
    it, which are not trained on; V of the whole response is its reward. A segment begins at every `interval`-th
    uncertain token, one with a probability below `certain`; what is before the first cut has A = 0. Certain tokens have
    A = 0, then A is whitened over the step's tokens, then certain tokens leave loss and mean. Clip 0.2.

    Source: the authors' code (AIFrameResearch/SPO), without its KL to the first policy. There probabilities are the
    trainer's, and whitening and mean are those of a microbatch; here the engine's, and those of the step. The value of
    the prompt is estimated once per group, as there; equal longer prefixes are not shared."""

    name = "spo_chain"
    summary = "S with A = V(segment's end) - V(its beginning) by continuations, whitened, on uncertain tokens"
    paper = "arXiv:2505.23564"
    takes_episodes = False
    needs_tokens = True

    interval: int = hyper(5, "Uncertain tokens per segment.", ge=1)
    continuations: int = hyper(9, "Responses from each cut, whose mean reward is its value.", ge=1)
    certain: float = hyper(0.9, "Probability from which a token is certain.", gt=0, le=1)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round != 1:
            return [] if view.round else drawn_groups(view)
        asks = []
        for index, group in enumerate(view.groups):
            starts = [(one, cut) for one in group.rollouts for cut in self.cuts(one.behaviour_logp)]
            prefixes = [tuple(one.response_ids[:cut]) for one, cut in starts if cut]
            if any(cut == 0 for _, cut in starts):
                prefixes.insert(0, ())
            prompt = view.prompt(index)
            asks += [Ask(prompt, self.continuations, index, prefix=one, origin="baseline") for one in prefixes]
        return asks

    def uncertain(self, logp_L: Sequence[float]) -> list[bool]:
        return [math.exp(logp) < self.certain for logp in logp_L]

    def cuts(self, logp_L: Sequence[float]) -> list[int]:
        """Tokens at which a segment begins."""
        return [place for place, uncertain in enumerate(self.uncertain(logp_L)) if uncertain][:: self.interval]

    def advantages(self, step: StepView) -> Sequence[float | torch.Tensor]:
        import torch

        open_ = {index: torch.tensor(self.uncertain(logp_L)) for index, logp_L in enumerate(step.behaviour_N)}
        found: dict[int, torch.Tensor] = {}
        for _, members in itertools.groupby(range(len(step.group_N)), key=step.group_N.__getitem__):
            found |= {one: torch.tensor(of) * open_[one] for one, of in self.of_segments(step, [*members]).items()}
        inside = [index for index in found if step.counts_N[index]]
        every_T = torch.cat([torch.zeros(0), *(found[index] for index in inside)])
        trained = sum(int(open_[index].sum()) for index in inside)
        if len(every_T) < 2 or not trained:
            return [0.0] * len(step.group_N)
        scale = (every_T.var() + 1e-8).rsqrt() * len(every_T) / trained
        whole = {index: (one - every_T.mean()) * scale * open_[index] for index, one in found.items()}
        return [whole.get(index, 0.0) for index in range(len(step.group_N))]

    def of_segments(self, step: StepView, members: Sequence[int]) -> dict[int, list[float]]:
        """Advantages of each token of a group's own responses, before whitening."""
        drawn = [index for index in members if step.origin_N[index] == "baseline"]
        batches = [drawn[start : start + self.continuations] for start in range(0, len(drawn), self.continuations)]
        values = iter([_mean([step.reward_N[one] for one in batch if step.counts_N[one]]) for batch in batches])
        cuts = {index: self.cuts(step.behaviour_N[index]) for index in members if index not in drawn}
        of_prompt = next(values) if any(0 in one for one in cuts.values()) else None
        found = {}
        for index, places in cuts.items():
            states = [(cut, next(values) if cut else of_prompt) for cut in places]
            known = [(cut, value) for cut, value in states if value is not None]  # else none could be graded
            found[index] = [0.0] * step.length_N[index]
            for (start, before), (end, after) in itertools.pairwise(
                [*known, (len(found[index]), step.reward_N[index])]
            ):
                found[index][start:end] = [after - before] * (end - start)
        return found


def _mean(rewards: Sequence[float]) -> float | None:
    return sum(rewards) / len(rewards) if rewards else None
