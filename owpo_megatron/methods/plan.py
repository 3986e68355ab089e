"""Rollout plans: what a method asks for in a step, round by round, and which groups it keeps. Imports no torch.

The collector (trainer/rollouts.py) calls `Method.plan` before each round; what it returns is drawn and graded, and the
next call sees it. An empty answer ends the step's rollouts, and `Method.keep` picks what is trained on. Dynamic
sampling is the default plan of methods with `groups = "mixed"`.

A plan is pure: it draws at random with `view.random` alone and remembers between steps through the ledger, the pool and
`view.memory` alone, so that a resumed run asks for the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from owpo_megatron.types import Group, Origin, Prompt, PromptRecord, Rollout


@dataclass(frozen=True)
class Ask:
    """Responses to one prompt that a round draws, or takes as they are, for one group.

    Without `group` they open a group of their own; with it they join view.groups[group], after its siblings. A group
    that this round opens has the next number.

    Example:
        Ask(prompt, 8)
        Ask(prompt, 1, temperature=1e-6, group=3)
    """

    prompt: Prompt
    siblings: int = 0
    group: int | None = None
    temperature: float | None = None  # None: rollout.temperature
    max_tokens: int | None = None  # None: rollout.max_response_tokens, less the prefix
    prefix: tuple[int, ...] = ()  # tokens that begin the response: graded with it, not trained on
    extends: int | None = None  # sibling of `group` whose response is continued; the longer one takes its place
    trained_on: Prompt | None = None  # prompt to train with, where the engine sees another (with a hint)
    origin: Origin = "policy"
    given: tuple[Rollout, ...] = ()  # responses that are graded and join as they are: an expert's, or earlier ones

    def __post_init__(self) -> None:
        assert self.siblings > 0 or self.given, "ask for at least one response"
        assert self.extends is None or (self.siblings == 1 and self.group is not None), "one sibling is continued"


class Solutions(Protocol):
    """Holds what the data have about a prompt besides its answer (data/solutions.py)."""

    def hints(self, prompt: Prompt) -> Sequence[str]:
        """Texts that help, the least helpful first; () where there are none."""

    def solutions(self, prompt: Prompt) -> Sequence[str]:
        """Whole responses of experts; () where there are none."""

    def hinted(self, prompt: Prompt, hint: str, words: str = "") -> Prompt:
        """The prompt with a hint after its problem, template applied; `words` introduce it."""

    def expert(self, prompt: Prompt, solution: str) -> Rollout:
        """The solution as a response to the prompt, with the end-of-sequence token."""

    def answer_after(self, prompt: Prompt, solution: str) -> Rollout | None:
        """The prompt's answer as a continuation of the solution up to its last mention; None: it never mentions it."""

    def answered(self, rollout: Rollout) -> tuple[Rollout, Rollout] | None:
        """The prompt's answer in the place of the response's own, and the same without its reasoning; None: it gives no
        answer."""


@dataclass(frozen=True)
class TokenStatistics:
    """The policy's values for one response, through the trainer."""

    logp_L: Sequence[float]
    entropy_L: Sequence[float]


@dataclass(frozen=True)
class PlanView:
    """Holds what a plan sees of the step that is being collected."""

    step: int  # steps done before this one
    steps: int  # of the run
    round: int  # 0: nothing was drawn yet
    max_rounds: int
    prompts_per_step: int
    group_size: int
    oversampling: float
    temperature: float
    max_tokens: int
    groups: Sequence[Group]  # drawn so far in this step, in the order in which they were opened
    dynamic: bool  # groups whose rewards are all equal are dropped and replaced
    take: Callable[[int], list[Prompt]]  # the next prompts of the stream
    is_mixed: Callable[[Group], bool]  # siblings that count differ in the verifier's reward
    rewards: Callable[[Group], list[float]]  # the verifier's, of the siblings that count
    record: Callable[[Prompt], PromptRecord | None]  # the ledger's; None: never drawn, or no ledger is kept
    stored: Callable[[Prompt], Sequence[Rollout]]  # the pool's earlier responses, oldest first
    statistics: Callable[[Sequence[Rollout]], list[TokenStatistics]]  # the present policy's, by a pass over them
    solutions: Solutions | None  # for methods with needs_solutions
    memory: dict[str, Any]  # what the plan keeps from step to step, as plain JSON; in checkpoints
    random: random.Random  # a generator of this run, step and round alone

    def prompt(self, group: int) -> Prompt:
        """The prompt of a group."""
        return self.groups[group].rollouts[0].prompt

    def failed(self, group: Group) -> bool:
        """True where no sibling that counts has a reward."""
        return not any(self.rewards(group))

    def success(self, group: Group) -> float:
        """Mean reward of the siblings that count; 0 where none does."""
        rewards = self.rewards(group)
        return sum(rewards) / max(len(rewards), 1)


def siblings(group: Group, places: Sequence[int]) -> Group:
    """The group with these siblings alone."""
    rollouts, verdicts, rewards = group.rollouts, group.verdicts, group.rewards
    return replace(
        group,
        rollouts=tuple(rollouts[place] for place in places),
        verdicts=tuple(verdicts[place] for place in places),
        rewards=tuple(rewards[place] for place in places),
    )


def drawn_groups(view: PlanView) -> list[Ask]:
    """One group for each of the next prompts; with dynamic sampling again, until enough of them are mixed.

    Source: DAPO (arXiv:2503.14476), section 3.2.
    """
    if view.round >= (view.max_rounds if view.dynamic else 1):
        return []
    kept = sum(view.is_mixed(group) for group in view.groups)
    if view.round > 0 and kept >= view.prompts_per_step:
        return []
    count = missing_prompts(view, kept)
    return [Ask(prompt, view.group_size) for prompt in view.take(count)]


def missing_prompts(view: PlanView, kept: int) -> int:
    """Prompts of the next round: what is missing, scaled by the share of groups kept so far, times oversampling."""
    most = math.ceil(view.prompts_per_step * view.oversampling)
    if not view.groups:
        return most
    expected = -(-(view.prompts_per_step - kept) * len(view.groups) // max(kept, 1))
    return min(most, math.ceil(expected * view.oversampling))


def first_groups(view: PlanView) -> list[Group]:
    """The step's groups in the order in which they were opened; with dynamic sampling the mixed ones."""
    return [group for group in view.groups if not view.dynamic or view.is_mixed(group)][: view.prompts_per_step]
