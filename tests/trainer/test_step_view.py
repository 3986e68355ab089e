"""The view of a step in `advantages`, the memory of a method from step to step; parts and weights of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePolicy, FakeReference, NoLog
from tiny import make_config

from owpo_megatron.config import RewardConfig
from owpo_megatron.errors import UserError
from owpo_megatron.methods import Dapo, Method, StepView, make_method
from owpo_megatron.trainer.batches import BatchBuilder
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.types import Group, Prompt, Rollout, Verdict


def group(name: str, *verdicts: Verdict, truncated: int = -1) -> Group:
    """Sibling i answers with i + 1 tokens."""
    prompt = Prompt(name, (5, 6), "", "")
    rollouts = tuple(
        Rollout(prompt, (7,) * (index + 1), (-0.5,) * (index + 1), 0, "length" if index == truncated else "stop", index)
        for index in range(len(verdicts))
    )
    return Group(rollouts, verdicts, tuple(verdict.reward for verdict in verdicts))


RIGHT, WRONG = Verdict(True, "ok"), Verdict(False, "wrong")


@dataclass(frozen=True)
class Looking(Dapo):
    """DAPO that keeps what it saw, and counts its steps."""

    name = "looking"
    needs_text = True
    needs_old_entropy = True

    def advantages(self, step: StepView) -> list[float]:
        step.memory["steps"] = step.memory.get("steps", 0) + 1
        SEEN.append(step)
        return [0.5] * len(step.reward_N)


SEEN: list[StepView] = []


def builder(method: Method, **rewards: Any) -> BatchBuilder:
    rollout = {"prompts_per_step": 2, "group_size": 3, "max_response_tokens": 6}
    policy = FakePolicy()
    config = make_config(Path("unused"), rollout=rollout, optimizer={"updates_per_step": 2, "steps": 10})
    rules = RewardRules.of(config.rollout, config.verifier, RewardConfig(**rewards))
    return BatchBuilder(
        config.algorithm, 3, 2, rules, StagePlan.of(config.reference, 10), method, policy, FakeReference(policy),
        decode=lambda ids: f"<{ids[0]}>", steps=10,
    )  # fmt: skip


def test_the_whole_step_is_in_view() -> None:
    SEEN.clear()
    crashed = Verdict(False, "crashed")
    style = Verdict(True, "ok", score=0.7, parts={"style": 0.25})
    groups = [group("a", RIGHT, WRONG, crashed), group("b", style, WRONG, truncated=1)]
    batches = builder(Looking(), weights={"style": 2.0, "length": -0.5})
    minibatches = list(batches.prepare(groups, 4, NoLog()))
    (step,) = SEEN
    assert step.counts_N == [True, True, False, True, True]
    assert step.group_N == [0, 0, 0, 1, 1] and step.prompt_N == ["a", "a", "a", "b", "b"]
    assert step.length_N == [1, 2, 3, 1, 2] and step.max_length == 6 and step.progress == pytest.approx(0.4)
    assert step.right_N == [True, False, False, True, False]
    assert step.part_N["verdict"] == [1, 0, 0, 0.7, 0] and step.part_N["style"] == [0, 0, 0, 0.25, 0]
    assert step.part_N["length"] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 1 / 6, 2 / 6])
    assert step.weights == {"length": -0.5, "style": 2.0, "verdict": 1.0}
    assert step.reward_N == pytest.approx([1 - 1 / 12, -1 / 6, -1 / 4, 0.7 + 0.5 - 1 / 12, -1 / 6])
    assert step.groups == [[0, 1], [3, 4]]
    assert step.pieces_N[1] == ["<7>", "<7>"] and step.behaviour_N[2] == (-0.5, -0.5, -0.5)
    assert [len(one) for one in step.entropy_N] == step.length_N
    samples = [sample for minibatch in minibatches for sample in minibatch]
    assert [sample.masked for sample in samples] == [False, False, True, False, False]
    assert all(sample.old_logp is not None for sample in samples), "the pass that gave the entropies gave these, too"
    assert [sample.reward for sample in samples] == pytest.approx(step.reward_N)


def test_memory_goes_into_checkpoints() -> None:
    SEEN.clear()
    batches = builder(Looking())
    list(batches.prepare([group("a", RIGHT, WRONG, WRONG)], 0, NoLog()))
    state = batches.state_dict()
    assert state == {"memory": {"steps": 1}}
    resumed = builder(Looking())
    resumed.load_state_dict({"memory": dict(state["memory"])})
    list(resumed.prepare([group("a", RIGHT, WRONG, WRONG)], 1, NoLog()))
    assert SEEN[-1].memory == {"steps": 2}


def test_a_resumed_riskpo_continues_its_quantiles() -> None:
    """The same two steps, in one run and in two."""
    groups = [group("a", RIGHT, WRONG, RIGHT), group("b", WRONG, WRONG, RIGHT)]

    def advantages(batches: BatchBuilder, step: int) -> list[Any]:
        return [sample.advantage for one in batches.prepare(groups, step, NoLog()) for sample in one]

    whole = builder(make_method("riskpo", bundle=2))
    first, second = advantages(whole, 0), advantages(whole, 1)
    assert first != second
    early = builder(make_method("riskpo", bundle=2))
    assert advantages(early, 0) == first
    late = builder(make_method("riskpo", bundle=2))
    late.load_state_dict(early.state_dict())
    assert advantages(late, 1) == second


def rules(**rewards: Any) -> RewardRules:
    config = make_config(Path("unused"), rollout={"max_response_tokens": 4})
    return RewardRules.of(config.rollout, config.verifier, RewardConfig(**rewards))


def test_weights_gate_and_correction_by_hand() -> None:
    styled = [Verdict(True, "ok", parts={"style": 0.5}), Verdict(False, "wrong", parts={"style": 1.0})]
    assert rules().shaped(group("a", *styled)) == [1.0, 0.0], "parts without a weight count nothing"
    assert rules(weights={"style": 0.2}).shaped(group("a", *styled)) == pytest.approx([1.1, 0.2])
    assert rules(weights={"style": 0.2, "verdict": 3.0}).shaped(group("a", *styled)) == pytest.approx([3.1, 0.2])
    # G-RA: gate 1: the wrong answer's style does not count; -inf: the plain sum; +inf: the verdict alone
    assert rules(weights={"style": 0.2}, gate=1.0).shaped(group("a", *styled)) == pytest.approx([1.1, 0.0])
    assert rules(weights={"style": 0.2}, gate=-1e9).shaped(group("a", *styled)) == pytest.approx([1.1, 0.2])
    assert rules(weights={"style": 0.2}, gate=1e9).shaped(group("a", *styled)) == pytest.approx([1.0, 0.0])
    # (1 - .1) / .6 and (0 - .1) / .6
    corrected = rules(false_positive=0.1, false_negative=0.3).shaped(group("a", *styled))
    assert corrected == pytest.approx([1.5, -1 / 6])
    assert rules(weights={"truncated": -0.4, "length": 0.1}).shaped(group("a", RIGHT, RIGHT, truncated=1)) == (
        pytest.approx([1 + 0.1 / 4, 1 - 0.4 + 0.2 / 4])
    )


def test_a_weight_of_nothing_is_refused() -> None:
    message = "reward.weights.stile = 0.2: no rule returned such a part; use one of length, style, truncated, verdict"
    styled = group("a", Verdict(True, "ok", parts={"style": 0.5}))
    with pytest.raises(UserError, match=message):
        rules(weights={"stile": 0.2}).check_weights([styled])
    rules(weights={"style": 0.2}).check_weights([group("b", RIGHT), styled])  # another rule may have no such part
    rules(weights={"style": 0.2}).check_weights([group("b", Verdict(False, "crashed"))])  # nothing was graded
    with pytest.raises(UserError, match="reward.false_negative = 0.6: with false_positive = 0.5 it must stay below 1"):
        make_config(Path("unused"), reward={"false_positive": 0.5, "false_negative": 0.6})
    with pytest.raises(UserError, match="reward.weights = .*: opd does not use rewards"):
        make_config(Path("unused"), reward={"weights": {"length": 1.0}}, algorithm={"name": "opd"})


def test_flips_and_corrections_cancel_on_average() -> None:
    """`verifier.flip` p and the correction with both rates p: the mean over many draws is the clean reward."""
    from owpo_megatron.trainer.noise import RewardNoise

    noise, correction = RewardNoise(3, 0.15), rules(false_positive=0.15, false_negative=0.15)
    for truth in (0.0, 1.0):
        told = [noise.reward(truth, draw, 0) for draw in range(4000)]
        found = [(reward - correction.false_positive) / 0.7 for reward in told]
        assert sum(found) / len(found) == pytest.approx(truth, abs=0.03)
    assert {noise.reward(0.3, draw, 0) for draw in range(50)} == {0.3, 0.7}, "a graded reward is mirrored"
