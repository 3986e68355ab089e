"""Build what a method's `advantages` sees of a step, from groups and samples: the same on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch

from owpo_megatron.methods import Method, StepView, turns_of
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.types import Group, Sample

Value = TypeVar("Value")


class Undeclared(Sequence[Any]):
    """A field that comes to methods with `needs_tokens` alone: reading it is an error, on one rank as on many."""

    def __init__(self, method: Method, field: str):
        self._method, self._field = method.name, field

    def _refuse(self) -> NoReturn:
        raise TypeError(f"{self._method}.advantages reads step.{self._field}: declare needs_tokens = True")

    def __len__(self) -> int:
        self._refuse()

    def __getitem__(self, place: Any) -> Any:
        self._refuse()


def step_view(
    method: Method,
    rules: RewardRules,
    groups: Sequence[Group],
    samples: Sequence[Sample],
    entropies: Sequence[torch.Tensor],
    decode: Callable[[Sequence[int]], str] | None,
    progress: float,
    memory: dict[str, Any],
) -> StepView:
    """Return the inputs of the method's `advantages`.

    Args:
        samples: of these groups, in submission order, with tokens where the method needs them.
        entropies: [L] of each, for methods with `needs_old_entropy`.
        decode: token ids to text, for methods with `needs_text`.
        progress: share of the run's steps that are done.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    pieces: list[list[str]] = []
    if method.needs_text:
        assert decode is not None, f"{method.name} needs the texts of tokens"
        pieces = [[decode([token]) for token in _generated(one, one.response_ids)] for one in samples]
    rules.check_weights(groups)
    parts = [rules.parts(group) for group in groups]
    names = sorted({name for one in parts for name in one if rules.weight(name)})
    turns: Sequence[Any] = Undeclared(method, "turns_N")
    behaviour: Sequence[Any] = Undeclared(method, "behaviour_N")
    if method.needs_tokens or method.needs_text:
        turns = [turns_of(rollout, sample.response_ids) for rollout, sample in zip(rollouts, samples, strict=True)]
        behaviour = [_generated(sample, sample.behaviour_logp) for sample in samples]
    return StepView(
        reward_N=[reward for group in groups for reward in rules.shaped(group)],
        counts_N=[inside for group in groups for inside in rules.counts(group)],
        group_N=[index for index, group in enumerate(groups) for _ in group.rollouts],
        length_N=[rollout.generated_length for rollout in rollouts],
        origin_N=[rollout.origin for rollout in rollouts],
        past_N=[group.past for group in groups for _ in group.rollouts],
        prompt_N=[rollout.prompt.id for rollout in rollouts],
        right_N=[verdict.correct for group in groups for verdict in group.verdicts],
        part_N={
            name: [
                value
                for one, group in zip(parts, groups, strict=True)
                for value in one.get(name, [0.0] * len(group.rollouts))
            ]
            for name in names
        },
        weights={name: rules.weight(name) for name in names},
        behaviour_N=behaviour,
        entropy_N=entropies if method.needs_old_entropy else (),
        turns_N=turns,
        pieces_N=pieces,
        max_length=rules.max_tokens,
        progress=progress,
        memory=memory,
    )


def _generated(sample: Sample, values: Sequence[Value]) -> Sequence[Value]:
    """The values of the tokens that the policy generated."""
    mask = sample.loss_mask
    return values if mask is None else tuple(itertools.compress(values, mask))


def checked_advantage(method: Method, advantage: float | torch.Tensor, length: int) -> float | torch.Tensor:
    """Return what `advantages` gave for a response of so many tokens: a finite number, or finite numbers [L].

    Raises:
        TypeError: it is of another shape.
        FloatingPointError: it is not finite.
    """
    if not isinstance(advantage, torch.Tensor) or advantage.dim() == 0:
        advantage = float(advantage)
    elif advantage.shape != (length,):
        shape = tuple(advantage.shape)
        raise TypeError(f"{method.name}.advantages: {shape} for a response of {length} tokens; give one per token")
    if not torch.as_tensor(advantage).isfinite().all():
        raise FloatingPointError(f"{method.name}.advantages returned {advantage}")
    return advantage
