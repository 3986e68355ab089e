"""CURE: responses are drawn again from one of their most uncertain tokens; originals and branches are one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.plan import Ask, PlanView, first_groups
from owpo_megatron.methods.sampling.base import Sampled


@dataclass(frozen=True)
class Cure(Sampled):
    """Draw group_size siblings, 1 / (1 + branches) of them originals; each is continued `branches` times from before a
    random one of its `uncertain` tokens with the highest entropy (never the first). What comes before it counts as
    prompt: it is graded with the branch and not trained on. Mixed groups only; clip 0.2 / 0.28, token mean.

    Source: the authors' first stage (bytedance/CURE: 4 originals, 3 branches of each); the second is DAPO. They skip
    special tokens and those of one character, which takes a tokenizer; here only the last token is skipped."""

    name = "cure"
    summary = "as DAPO's S; branches from uncertain tokens join the group"
    paper = "arXiv:2508.11016"
    groups = "mixed"
    takes_episodes = False

    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
    branches: int = hyper(3, "Continuations of each original.", ge=1)
    uncertain: int = hyper(20, "Most uncertain tokens, one of which is branched from.", ge=1)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        originals = max(view.group_size // (1 + self.branches), 1)
        kept = len(first_groups(view))
        if view.round % 2:
            return self.branched(view, originals)
        if kept >= view.prompts_per_step or view.round >= 2 * view.max_rounds:
            return []
        return [Ask(prompt, originals) for prompt in view.take(view.prompts_per_step - kept)]

    def branched(self, view: PlanView, originals: int) -> list[Ask]:
        new = [index for index, group in enumerate(view.groups) if len(group.rollouts) == originals]
        rollouts = [(index, rollout) for index in new for rollout in view.groups[index].rollouts]
        looks = view.statistics([rollout for _, rollout in rollouts])
        asks = []
        for (index, rollout), look in zip(rollouts, looks, strict=True):
            places = range(1, len(rollout.response_ids) - 1)
            top = sorted(places, key=lambda place: -look.entropy_L[place])[: self.uncertain]
            start = view.random.choice(top) if top else 0
            asks.append(Ask(rollout.prompt, self.branches, group=index, prefix=tuple(rollout.response_ids[:start])))
        return asks
