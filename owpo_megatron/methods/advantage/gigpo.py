"""GiGPO: a group's comparison of episodes, and within it one of the turns that began in the same state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView, Turn, normalised_in_groups
from owpo_megatron.methods.normalise import z_scores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gigpo(Clipped):
    """A = z(episode's reward) + ω z(turn's return), the second among the group's turns with the same observation.

    A turn's return is Σ γ^k of the rewards from it on. Where an environment gives one reward at the end, it is the last
    turn's. A turn that is alone in its state has only the first part. Responses of one turn are two copies of GRPO's
    advantage: use another method for those.
    """

    name = "gigpo"
    summary = "S with A = z(episode) + ω z(return of the turn among turns in the same state)"
    paper = "arXiv:2505.10978"
    needs_tokens = True

    omega: float = hyper(1.0, "Weight ω of the comparison of turns.", ge=0)
    gamma: float = hyper(0.95, "Discount γ of later turns' rewards.", ge=0, le=1)

    def advantages(self, step: StepView) -> Sequence[float | torch.Tensor]:
        import torch

        turns_N = step.turns_N or [[Turn(length, ())] for length in step.length_N]
        of_turns = [[0.0] * len(turns) for turns in turns_N]
        for group in step.groups:
            states: dict[tuple[int, ...], list[tuple[int, int, float]]] = {}
            for index in group:
                returns = returns_of(turns_N[index], step.reward_N[index], self.gamma)
                for place, (turn, value) in enumerate(zip(turns_N[index], returns, strict=True)):
                    states.setdefault(turn.state, []).append((index, place, value))
            for alike in states.values():
                for (index, place, _), value in zip(alike, z_scores([one[2] for one in alike]), strict=True):
                    of_turns[index][place] = value
        episodes = normalised_in_groups(step, self.advantage_std)
        return [
            torch.tensor(
                [
                    episode + self.omega * value
                    for turn, value in zip(turns, values, strict=True)
                    for _ in range(turn.length)
                ]
            )
            for episode, turns, values in zip(episodes, turns_N, of_turns, strict=True)
        ]


def returns_of(turns: Sequence[Turn], reward: float, gamma: float) -> list[float]:
    """Discounted rewards from each turn on; what the turns' own rewards leave of the episode's is the last turn's.

    Example:
        >>> returns_of([Turn(2, ()), Turn(3, (7,)), Turn(1, (8,))], reward=1.0, gamma=0.5)
        [0.25, 0.5, 1.0]
    """
    rewards = [turn.reward for turn in turns]
    if rewards:
        rewards[-1] += reward - sum(rewards)
    out, following = [], 0.0
    for own in reversed(rewards):
        following = own + gamma * following
        out.append(following)
    return out[::-1]
