"""BatchBuilder: advantages, active samples, and the log-prob passes that are spent, not spent, and equal either way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakePolicy, FakeReference, NoLog, fake_logprobs, make_batches
from tiny import make_config

from owpo_megatron.config import Config
from owpo_megatron.mcore.packing import build_microbatch, token_batch
from owpo_megatron.methods import dense_loss, make_method
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.types import Group, Prompt, Rollout, Sample, Verdict

PROMPT = Prompt("p", (5, 6), "", "")
ALGORITHMS = ("owpo", "owpo_no_asym", "owpo_no_locking", "owpo_no_accel", "grpo", "dapo", "sym_dapo", "opd", "mopd")


def config_of(updates: int = 1, steps: int = 10, every: int = 4, **sections: Any) -> Config:
    rollout = {"prompts_per_step": 4, "group_size": 4}
    return make_config(
        Path("unused"), rollout=rollout, optimizer={"updates_per_step": updates, "steps": steps},
        reference={"every": every}, **sections,
    )  # fmt: skip


def stages_of(config: Config) -> StagePlan:
    return StagePlan.of(config.reference, config.optimizer.steps)


def group(*reasons: str) -> Group:
    """Siblings with these verdicts; sibling i answers with i + 1 tokens."""
    rollouts = tuple(
        Rollout(PROMPT, tuple(range(index + 1)), (-0.5,) * (index + 1), 0, "stop", index)
        for index in range(len(reasons))
    )
    verdicts = tuple(Verdict(reason == "ok", reason) for reason in reasons)  # type: ignore[arg-type]
    return Group(rollouts, verdicts, tuple(float(verdict.correct) for verdict in verdicts))


def samples_of(config: Config, groups: list[Group], step: int = 0) -> list[Sample]:
    return make_batches(config, stages_of(config)).samples(groups, step)


def test_advantages_of_a_hand_example_with_a_masked_sibling() -> None:
    """Rewards 1 and 0, 0 of three graded siblings: mean 1/3, unbiased std 1/sqrt(3); the time-out takes no part."""
    samples = samples_of(config_of(), [group("ok", "timeout", "wrong", "wrong")])
    std = (1 / 3) ** 0.5
    expected = [(2 / 3) / std, 0.0, (-1 / 3) / std, (-1 / 3) / std]
    assert [sample.advantage for sample in samples] == pytest.approx(expected, abs=1e-5)
    assert [sample.masked for sample in samples] == [False, True, False, False]
    assert [sample.active for sample in samples] == [True, False, True, True]


def test_failures_count_as_wrong_where_they_are_not_masked() -> None:
    samples = samples_of(config_of(verifier={"mask_failures": False}), [group("ok", "timeout", "crashed", "wrong")])
    assert [sample.advantage for sample in samples] == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert not any(sample.masked for sample in samples)


def test_a_group_of_failures_alone_takes_no_part() -> None:
    samples = samples_of(config_of(), [group("timeout", "crashed", "timeout", "timeout")])
    assert all(s.masked and not s.active and s.advantage == 0.0 for s in samples)


def test_the_most_telling_samples_stay_active_and_ties_go_to_the_earlier() -> None:
    """Step 2 of a stage of 4: n_act = 2. |A| is largest for the only right one, then sibling 0 of the tie."""
    samples = samples_of(config_of(), [group("wrong", "wrong", "ok", "wrong")], step=2)
    assert [sample.active for sample in samples] == [True, False, True, False]


def test_the_curriculum_falls_to_one_and_starts_again_after_a_swap() -> None:
    """Ten steps with a swap every four: stages of 4, 4 and 2 steps."""
    config = config_of()
    policy = FakePolicy()
    builder = make_batches(config, stages_of(config), make_method("owpo"), policy, FakeReference(policy))
    log = [NoLog() for _ in range(10)]
    for step in range(10):
        (samples,) = builder.prepare([group("ok", "wrong", "wrong", "wrong")], step, log[step])
        assert sum(sample.active for sample in samples) == log[step].values["n_active"]
    assert [one.values["n_active"] for one in log] == [4, 3, 2, 1, 4, 3, 2, 1, 4, 1]
    assert [one.values["stage"] for one in log] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_without_curriculum_all_stay_active() -> None:
    config = config_of(algorithm={"curriculum": False})
    for step in (0, 3):
        assert all(sample.active for sample in samples_of(config, [group("ok", "wrong", "ok", "wrong")], step))


def annotated(
    config: Config, policy: FakePolicy, reference: FakeReference, groups: int = 4, step: int = 0, name: str = "owpo"
) -> list[list[Sample]]:
    builder = make_batches(config, stages_of(config), make_method(name), policy, reference)
    minibatches = list(builder.prepare([group("ok", "wrong", "wrong", "ok")] * groups, step, NoLog()))
    policy.events.append("handed out")
    return minibatches


def test_no_pass_is_spent_on_what_is_known() -> None:
    """One update a step, and a reference that is the policy: nothing runs; the ratio to the reference is 1."""
    policy = FakePolicy()
    (samples,) = annotated(config_of(), policy, FakeReference(policy))
    assert policy.events == ["handed out"]
    assert all(s.old_logp is None and s.ref_logp is None and s.ref_is_old == s.active for s in samples)


def test_the_reference_pass_is_of_active_samples_only() -> None:
    policy = FakePolicy()
    reference = FakeReference(policy)
    policy.version = 3
    (samples,) = annotated(config_of(), policy, reference, step=1)  # n_act = 3 of 4
    assert policy.events == ["reference.logprobs 12", "handed out"]
    for sample, logp in zip(samples, fake_logprobs(samples, 0), strict=True):
        assert (sample.ref_logp is not None) == sample.active and not sample.ref_is_old
        assert sample.ref_logp is None or torch.equal(sample.ref_logp, logp)


def test_several_updates_take_old_log_probs_before_the_first_of_them() -> None:
    """All passes are of the step's start, minibatch by minibatch; whole groups go together."""
    policy = FakePolicy()
    reference = FakeReference(policy)
    policy.version = 3
    minibatches = annotated(config_of(updates=2), policy, reference)
    passes = ["policy.logprobs 8", "policy.logprobs 8", "reference.logprobs 8", "reference.logprobs 8"]
    assert policy.events == [*passes, "handed out"]
    assert [len(samples) for samples in minibatches] == [8, 8]
    for samples in minibatches:
        for sample, logp in zip(samples, fake_logprobs(samples, 3), strict=True):
            assert torch.equal(sample.old_logp, logp)


@pytest.mark.parametrize(("groups", "sizes"), [(0, []), (1, [4]), (2, [4, 4]), (3, [4, 8]), (4, [8, 8])])
def test_fewer_groups_make_smaller_or_fewer_updates(groups: int, sizes: list[int]) -> None:
    policy = FakePolicy()
    minibatches = annotated(config_of(updates=2), policy, FakeReference(policy), groups=groups)
    assert [len(samples) for samples in minibatches] == sizes


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_method_gets_the_passes_that_it_needs(name: str) -> None:
    policy = FakePolicy()
    reference = FakeReference(policy)
    policy.version = 1
    (samples,) = annotated(config_of(), policy, reference, step=2, name=name)  # n_act = 2 of 4
    wanted = {"none": 0, "active": 8, "all": 16, "teacher": 16}[make_method(name).needs_reference]
    assert sum(sample.ref_logp is not None for sample in samples) == wanted
    assert policy.events == ([f"reference.logprobs {wanted}"] if wanted else []) + ["handed out"]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("reference_version", [2, 5])
def test_passes_not_spent_change_no_loss_and_no_gradient(name: str, reference_version: int) -> None:
    """Against both passes spent on every sample, through packing and the real objective; at the policy that sampled,
    with the reference being it (5) and being another (2)."""
    policy = FakePolicy()
    policy.version = reference_version
    reference = FakeReference(policy)
    policy.version = 5
    (lean,) = annotated(config_of(), policy, reference, step=2, name=name)
    full = [
        replace(sample, old_logp=old, ref_logp=ref, ref_is_old=False)
        for sample, old, ref in zip(lean, fake_logprobs(lean, 5), fake_logprobs(lean, reference_version), strict=True)
    ]
    objective = make_method(name)
    results = [loss_and_gradient(objective, samples) for samples in (lean, full)]
    (lean_loss, lean_gradient), (full_loss, full_gradient) = results
    assert torch.equal(lean_loss, full_loss) and torch.equal(lean_gradient, full_gradient)
    assert lean_gradient.abs().sum() > 0 or (name == "opd" and reference_version == 5)


def loss_and_gradient(objective: Any, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    microbatch = build_microbatch(samples, range(len(samples)), 1, torch.device("cpu"))
    logp_T = torch.zeros(microbatch.mask_T.numel())
    logp_T[microbatch.mask_T[0]] = torch.cat(fake_logprobs(samples, 5))
    logp_T.requires_grad_()
    out = dense_loss(objective, logp_T, token_batch(samples, microbatch))
    (gradient,) = torch.autograd.grad(out.loss_sum, logp_T)
    return out.loss_sum.detach(), gradient
