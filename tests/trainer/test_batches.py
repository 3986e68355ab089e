"""BatchBuilder: advantages, active samples, and the log-prob passes that are spent, not spent, and equal either way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coupled_methods import NINE, RightAgainstWrong, UncertainTokens
from fakes import FakePolicy, FakeReference, NoLog, fake_logprobs, make_batches
from tiny import make_config

from owpo_megatron.config import Config
from owpo_megatron.mcore.packing import build_microbatch, token_batch
from owpo_megatron.methods import Method, dense_loss, make_method
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.types import Group, Prompt, Rollout, Sample, Verdict

PROMPT = Prompt("p", (5, 6), "", "")
ALGORITHMS = [*NINE, "cispo", "rloo"]


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


# ------------------------------------------------------------------------------------------------- the method's seam
def prepared(
    method: Method, updates: int, reference: FakeReference, policy: FakePolicy, groups: int = 4
) -> list[list[Sample]]:
    """The minibatches of a step, with the policy changing after each, as an update does."""
    config = config_of(updates)
    builder, out = make_batches(config, stages_of(config), method, policy, reference), []
    for samples in builder.prepare([group("ok", "wrong", "wrong", "ok")] * groups, 0, NoLog()):
        out.append(samples)
        policy.update(samples, method)
    return out


def test_a_coupled_method_is_prepared_with_the_policy_right_before_each_update() -> None:
    """The first minibatch's log-probs are the old ones, whose pass ran; the second one's are taken after the update."""

    class Seen(RightAgainstWrong):
        seen: list[list[torch.Tensor]] = []

        def prepare(self, samples):
            self.seen.append(
                [torch.cat([one.now_logp_L for one in samples]), torch.stack([s.old_logp_L.sum() for s in samples])]
            )
            assert [one.group for one in samples] in ([0] * 4 + [1] * 4, [2] * 4 + [3] * 4)
            assert [one.reward for one in samples] == [1, 0, 0, 1] * 2
            return super().prepare(samples)

    class NeedsOld(Seen):
        needs_old = True

    policy = FakePolicy()
    first, second = prepared(NeedsOld(), 2, FakeReference(policy), policy)
    old = ["policy.logprobs 8", "policy.logprobs 8"]
    assert policy.events == [*old, "update 8", "policy.logprobs 8", "update 8"]
    for samples, version, (now, old_sums) in zip((first, second), (0, 1), NeedsOld.seen, strict=True):
        assert torch.equal(now, torch.cat(fake_logprobs(samples, version)))
        assert torch.equal(old_sums, torch.stack([logp.sum() for logp in fake_logprobs(samples, 0)]))
        assert all(set(sample.given) == {"slope", "share"} for sample in samples)


def test_a_further_statistic_comes_with_the_passes_that_run_anyway() -> None:
    """The old policy's is kept on the samples; a minibatch of `lp_reg` after the first is passed through again."""
    policy = FakePolicy()
    first, second = prepared(make_method("lp_reg", share=1.0), 2, FakeReference(policy), policy)
    passes = ["policy.logprobs and statistics 8"] * 2
    assert policy.events == [*passes, "update 8", "policy.logprobs and statistics 8", "update 8"]
    for sample in (*first, *second):
        assert torch.equal(sample.old_statistic, torch.tensor(sample.response_ids) / 100)
        assert set(sample.given) == {"held", "proxy"}
    # by the fake's numbers every token is below its proxy: held where A < 0
    assert all(bool(torch.as_tensor(one.given["held"]).all()) == (one.advantage < 0) for one in first)
    policy = FakePolicy()
    ((sample, *_),) = prepared(make_method("rover"), 1, FakeReference(policy), policy)
    assert policy.events == ["update 16"] and sample.old_statistic is None, "one update: the policy is the old one"


def test_one_update_of_a_coupled_method_takes_one_pass() -> None:
    policy = FakePolicy()
    (samples,) = prepared(RightAgainstWrong(), 1, FakeReference(policy), policy)
    assert policy.events == ["policy.logprobs 16", "update 16"] and samples[0].old_logp is None
    policy = FakePolicy()
    (samples,) = prepared(UncertainTokens(share=0.5), 1, FakeReference(policy), policy)
    assert policy.events == ["policy.logprobs and entropies 16", "update 16"]
    # tokens 0 | 0 1 | 0 1 2 | 0 1 2 3 of each group: the upper half of 40 are 12 tokens of 2 and 3, and 1s at the bound
    assert samples[3].given["kept"].tolist() == [0, 1, 1, 1]


def test_samples_that_do_not_count_are_in_no_prepare() -> None:
    policy = FakePolicy()
    config = config_of()
    builder = make_batches(config, stages_of(config), UncertainTokens(), policy, FakeReference(policy))
    (samples,) = builder.prepare([group("ok", "timeout", "wrong", "timeout")], 0, NoLog())
    assert [sample.given["kept"] == 0 if sample.masked else True for sample in samples] == [True] * 4
    assert samples[2].given["kept"].tolist() == [0, 1, 1], "of the tokens 0 | 0 1 2"


class Leave(RightAgainstWrong):
    """Leave-one-out on right answers, and per token on wrong ones."""

    def advantages(self, step):
        assert step.group_N == [0, 0, 0, 0, 1, 1, 1, 1] and step.length_N == [1, 2, 3, 4] * 2
        assert step.counts_N == [True, True, False, True] + [True] * 4
        return [
            2.0 if reward else -torch.arange(length).double()
            for reward, length in zip(step.reward_N, step.length_N, strict=True)
        ]


def test_a_methods_own_advantages_per_sample_and_per_token() -> None:
    config = config_of()
    groups = [group("ok", "wrong", "timeout", "ok"), group("wrong", "wrong", "ok", "wrong")]
    samples = make_batches(config, stages_of(config), Leave()).samples(groups, 3)  # one active sample per group
    assert [sample.advantage for sample in samples[:1] + samples[3:4]] == [2.0, 2.0]
    assert samples[1].advantage.tolist() == [0, -1] and samples[2].advantage == 0.0, "a sample that does not count"
    assert [sample.active for sample in samples] == [True, False, False, False, False, False, True, False]
    microbatch = build_microbatch(samples, (1, 3), 1, torch.device("cpu"))
    assert token_batch(samples, microbatch).advantage_T.tolist() == [0, 0, -1, 0, 2, 2, 2, 2]


def test_advantages_are_looked_at() -> None:
    def refused(answer: Any, error: type[Exception], message: str) -> None:
        method = type("Odd", (Leave,), {"advantages": lambda self, step: answer})()
        with pytest.raises(error, match=message):
            make_batches(config_of(), stages_of(config_of()), method).samples([group("ok", "wrong", "ok", "ok")], 0)

    refused([1.0], TypeError, "returned 1 for 4 samples")
    refused([1.0, 1.0, torch.ones(2), 1.0], TypeError, r"\(2,\) for a response of 3 tokens; give one per token")
    refused([1.0, 1.0, float("nan"), 1.0], FloatingPointError, "returned nan")


def test_groups_of_any_size_make_minibatches_of_whole_groups() -> None:
    config = config_of(updates=2)
    policy = FakePolicy()
    builder = make_batches(config, stages_of(config), None, policy, FakeReference(policy))
    groups = [group("ok", "wrong"), group("ok", "wrong", "wrong"), group(*["ok", "wrong"] * 4)]
    minibatches = list(builder.prepare(groups, 0, NoLog()))
    assert [[sample.group for sample in samples] for samples in minibatches] == [[0, 0], [1] * 3 + [2] * 8]
    # n_act = 4 of the configured group size: all of the smaller groups
    assert [sum(s.active for s in minibatches[1] if s.group == which) for which in (1, 2)] == [3, 4]
