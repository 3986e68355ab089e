"""Episodes between rollouts and samples: what a method sees of them and what it does not; metrics of a step's episodes.

Through packing and the head: tests/head/test_loss_mask.py; through the model: tests/policy/test_episode_updates.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fakes import NoLog
from test_step_view import RIGHT, WRONG, builder

from owpo_megatron.methods import Dapo, StepView, Turn
from owpo_megatron.trainer.episodes import episode_facts
from owpo_megatron.types import Episode, Group, Prompt, Rollout, Span

SEEN: list[StepView] = []
PROMPT = Prompt("p", (5, 6), "", "")
TWO_TURNS = Episode((Span(2, reward=0.5), Span(3, False, calls=2, errors=1), Span(1)), "done")
SPANS_OF_ONE = Episode((Span(2),), "turns")


def rollouts() -> tuple[Rollout, ...]:
    """An episode of two turns, one of one turn, and a response without an environment."""
    logps = (-0.1, -0.2, 0.0, 0.0, 0.0, -0.6)
    return (
        Rollout(PROMPT, (11, 12, 90, 91, 92, 13), logps, 0, "stop", 1, episode=TWO_TURNS),
        Rollout(PROMPT, (14, 15), (-0.7, -0.8), 0, "length", 2, episode=SPANS_OF_ONE),
        Rollout(PROMPT, (16,), (-0.9,), 0, "stop", 3),
    )


@dataclass(frozen=True)
class ByToken(Dapo):
    """Advantages 1, 2, ... over the tokens that it sees."""

    name = "by_token"
    needs_text = True
    needs_old_entropy = True

    def advantages(self, step: StepView) -> Sequence[torch.Tensor]:
        SEEN.append(step)
        return [torch.arange(1.0, length + 1) for length in step.length_N]


def test_a_method_sees_generated_tokens_alone() -> None:
    SEEN.clear()
    group = Group(rollouts(), (RIGHT, WRONG, WRONG), (1.0, 0.0, 0.0))
    (samples,) = builder(ByToken()).prepare([group], 0, NoLog())
    (step,) = SEEN
    assert step.length_N == [3, 2, 1]
    assert [tuple(one) for one in step.behaviour_N] == [(-0.1, -0.2, -0.6), (-0.7, -0.8), (-0.9,)]
    assert step.pieces_N == [["<11>", "<12>", "<13>"], ["<14>", "<15>"], ["<16>"]]
    entropies = [one.tolist() for one in step.entropy_N]  # a tenth of the id, by the fake policy
    assert entropies == [torch.tensor(ids).div(10).tolist() for ids in ([11, 12, 13], [14, 15], [16])]
    assert step.turns_N == [[Turn(2, (), 0.5), Turn(1, (90, 91, 92))], [Turn(2, ())], [Turn(1, ())]]
    assert [sample.loss_mask for sample in samples] == [(True, True, False, False, False, True), (True, True), None]
    assert samples[0].advantage.tolist() == [1, 2, 0, 0, 0, 3] and samples[2].advantage.tolist() == [1]
    assert samples[0].response_ids == (11, 12, 90, 91, 92, 13), "the model reads all of it"


def test_lengths_and_penalties_count_generated_tokens() -> None:
    rules = builder(Dapo(), weights={"length": 1.0})._rules
    parts = rules.parts(Group(rollouts(), (RIGHT, WRONG, WRONG), (1.0, 0.0, 0.0)))
    assert parts["length"] == [3 / 6, 2 / 6, 1 / 6]


def test_metrics_of_the_steps_episodes() -> None:
    assert episode_facts(rollouts()) == {
        "turns": 1.5,
        "tool_calls": 1.0,
        "tool_errors": 0.5,
        "observation_tokens": 3,
        "episodes_ended": {"done": 1, "turns": 1},
    }
    assert episode_facts(rollouts()[2:]) == {}
