"""Scaf-GRPO: where a prompt fails throughout, the least hint that helps replaces one sibling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups, siblings
from owpo_megatron.methods.sampling.base import Sampled
from owpo_megatron.types import Group


@dataclass(frozen=True)
class ScafGrpo(Sampled):
    """After `warmup` steps, a prompt all of whose siblings fail is asked once with each of its hints. The right answer
    to the least hint, if there is one, takes the first sibling's place; it is trained on with its hint. The record's
    `hints` are the levels, the least helpful first, each as it shall be shown (the authors: knowledge, planning,
    solution, four cumulative steps each). Source: the authors' code (dvlab-research/Scaf-GRPO)."""

    name = "scaf_grpo"
    summary = "as GRPO's S; one sibling replaced by a right response to the least hint"
    paper = "arXiv:2510.19807"
    needs_solutions = True
    takes_episodes = False

    warmup: int = hyper(50, "Steps without hints at the run's beginning.", ge=0)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round == 0:
            return drawn_groups(view)
        if view.round > 1 or view.step < self.warmup:
            return []
        assert view.solutions is not None
        return [
            Ask(view.solutions.hinted(view.prompt(index), hint), 1, group=index)
            for index, group in enumerate(view.groups)
            if view.failed(group)
            for hint in view.solutions.hints(view.prompt(index))
        ]

    def keep(self, view: PlanView) -> Sequence[Group]:
        return [self.scaffolded(group, view.group_size) for group in view.groups]

    def scaffolded(self, group: Group, size: int) -> Group:
        own = range(size)
        helped = next((at for at in range(size, len(group.rollouts)) if group.verdicts[at].correct), None)
        return siblings(group, own if helped is None else [helped, *own[1:]])
