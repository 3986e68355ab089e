"""GHPO: prompts that fail throughout are drawn again with a growing part of their solution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups, siblings
from owpo_megatron.methods.sampling.base import Sampled
from owpo_megatron.types import Group

PARTS = (0.25, 0.5, 0.75)
WORDS = "The following text is the beginning part of the answer, which you can refer to for solving the problem:\n"


@dataclass(frozen=True)
class Ghpo(Sampled):
    """Draw a group all of whose siblings fail again with 25, 50 and 75 % of the solution (in characters) after the
    problem, behind the authors' words (none with the template `raw`), until one of them succeeds; the last group is
    trained on with its hint. GRPO's advantages; a prompt without a solution stays as it is. Source: the authors' code
    (hkgc-1/GHPO)."""

    name = "ghpo"
    summary = "as GRPO's S; prompts that fail throughout again with a part of their solution"
    paper = "arXiv:2507.10628"
    needs_solutions = True
    takes_episodes = False

    start: int = hyper(0, "Steps without hints at the run's beginning.", ge=0)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round == 0:
            return drawn_groups(view)
        if view.round > len(PARTS) or view.step < self.start:
            return []
        assert view.solutions is not None
        asks = []
        for index, group in enumerate(view.groups):
            prompt = view.prompt(index)
            solutions = view.solutions.solutions(prompt)
            if solutions and view.failed(last_draw(group, view.group_size)):
                part = solutions[0][: round(len(solutions[0]) * PARTS[view.round - 1])]
                if part:
                    hinted = view.solutions.hinted(prompt, part, WORDS)
                    asks.append(Ask(hinted, view.group_size, group=index))
        return asks

    def keep(self, view: PlanView) -> Sequence[Group]:
        return [last_draw(group, view.group_size) for group in view.groups]


def last_draw(group: Group, size: int) -> Group:
    """The siblings of the group's latest draw."""
    count = len(group.rollouts)
    return siblings(group, range(count - size, count))
