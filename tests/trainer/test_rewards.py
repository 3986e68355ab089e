"""DAPO's parts around the loss: over-sampling, the punishment of overlong responses, truncated ones out of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeVerifier, NoLog, alone, make_batches, make_collector
from tiny import make_config

from owpo_megatron.config import Config
from owpo_megatron.config.reward import OWN_PARTS
from owpo_megatron.data import ShuffledStream
from owpo_megatron.errors import UserError
from owpo_megatron.methods import catalogue, find_method, make_method
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.types import Group, Prompt, Rollout, Verdict

PROMPT = Prompt("p", (3,), "problem", "ok")


def group(*siblings: tuple[bool, int], limit: int = 10, reasons: dict[int, str] | None = None) -> Group:
    """Siblings as (right, length); one of `limit` tokens was cut off."""
    rollouts = tuple(
        Rollout(PROMPT, (1,) * length, (-0.5,) * length, 0, "length" if length == limit else "stop", seed)
        for seed, (_, length) in enumerate(siblings)
    )
    verdicts = tuple(
        Verdict(right, (reasons or {}).get(index, "ok" if right else "wrong"))  # type: ignore[arg-type]
        for index, (right, _) in enumerate(siblings)
    )
    return Group(rollouts, verdicts, tuple(float(right) for right, _ in siblings))


def config_with(**rollout: Any) -> Config:
    sizes = {"prompts_per_step": 2, "group_size": 4, "max_response_tokens": 10}
    return make_config(Path("unused"), rollout=sizes | rollout, optimizer={"updates_per_step": 1})


def rules_of(config: Config) -> RewardRules:
    return RewardRules.of(config.rollout, config.verifier)


def advantages(config: Config, *groups: Group) -> list[tuple[float, bool]]:
    """(advantage, whether it is in the loss) of every sample."""
    samples = make_batches(config, StagePlan(10, None)).samples(groups, step=0)
    return [(round(sample.advantage, 5), not sample.masked) for sample in samples]


# --------------------------------------------------------------------------------------------- overlong responses
def test_the_penalty_by_hand() -> None:
    """DAPO's Eq. 13 with L_max = 20 and L_cache = 8: nothing up to 12, then a straight line to -1 at 20."""
    rules = RewardRules(max_tokens=20, overlong_tokens=8, overlong_penalty=1.0)
    assert [rules.penalty(length) for length in (0, 12, 13, 16, 19, 20)] == [0, 0, 1 / 8, 4 / 8, 7 / 8, 1]
    assert RewardRules(max_tokens=20, overlong_tokens=8, overlong_penalty=0.5).penalty(16) == 0.25
    assert RewardRules(max_tokens=20).penalty(20) == 0


def test_shaping_happens_before_normalisation() -> None:
    """Limit 10, the last 4 tokens, penalty 0.5: lengths 6, 8, 10, 2 lose 0, 0.25, 0.5, 0.

    Rewards 1, 1, 0, 0 become 1, 0.75, -0.5, 0: mean 0.3125, deviations 0.6875, 0.4375, -0.8125, -0.3125, their squares
    sum to 1.421875, so std = sqrt(1.421875 / 3) = 0.688447.
    """
    config = config_with(overlong_tokens=4)
    shaped = group((True, 6), (True, 8), (False, 10), (False, 2))
    std = (1.421875 / 3) ** 0.5 + 1e-6
    expected = [round(value / std, 5) for value in (0.6875, 0.4375, -0.8125, -0.3125)]
    assert [value for value, _ in advantages(config, shaped)] == expected
    plain = [value for value, _ in advantages(config_with(), shaped)]
    assert plain == [round(sign * 0.5 / (3**-0.5 + 1e-6), 5) for sign in (1, 1, -1, -1)]


def test_dynamic_sampling_looks_at_the_verifier_alone() -> None:
    """All wrong with unequal lengths: shaped rewards differ, but there is nothing right to learn from."""
    rules = rules_of(config_with(overlong_tokens=4))
    wrong = group((False, 6), (False, 8), (False, 10), (False, 2))
    assert len(set(rules.shaped(wrong))) > 1 and not rules.is_mixed(wrong)
    assert rules.is_mixed(group((True, 8), (False, 8), (False, 8), (False, 8)))


def test_being_overlong_makes_a_sample_active_unless_the_verifier_alone_decides() -> None:
    """Two right, two wrong, of which the last is cut off: rewards 1, 1, 0, -0.5 make it the only active sample at the
    end of a stage. With the verifier's rewards all |A| are equal, and the tie goes to the first."""
    one = group((True, 4), (True, 4), (False, 4), (False, 10))
    for active_by, place in (("shaped", 3), ("verifier", 0)):
        config = make_config(
            Path("unused"),
            algorithm={"active_by": active_by},
            rollout={"prompts_per_step": 2, "group_size": 4, "max_response_tokens": 10, "overlong_tokens": 4},
            optimizer={"updates_per_step": 1},
        )
        samples = make_batches(config, StagePlan(10, None)).samples([one], step=9)
        assert [sample.active for sample in samples] == [index == place for index in range(4)]
        assert samples[3].advantage < samples[2].advantage  # the loss has the shaped rewards either way


# --------------------------------------------------------------------------------------------- truncated responses
def test_truncated_responses_leave_loss_and_statistics() -> None:
    """Rewards without the last, truncated one are 1, 0, 0: mean 1/3, std sqrt((4 + 1 + 1)/9 / 2) = 0.57735."""
    one = group((True, 3), (False, 4), (False, 5), (False, 10))
    std = (6 / 9 / 2) ** 0.5 + 1e-6
    assert advantages(config_with(mask_truncated=True), one) == [
        (round(2 / 3 / std, 5), True),
        (round(-1 / 3 / std, 5), True),
        (round(-1 / 3 / std, 5), True),
        (0.0, False),
    ]
    assert advantages(config_with(), one)[3] == (-0.5, True)


def test_a_group_that_differs_by_its_truncated_ones_only_is_not_mixed() -> None:
    one = group((True, 3), (True, 4), (True, 5), (False, 10))
    assert rules_of(config_with()).is_mixed(one)
    assert not rules_of(config_with(mask_truncated=True)).is_mixed(one)


def test_failures_and_truncation_together_may_leave_nothing() -> None:
    one = group((False, 3), (True, 10), (False, 10), (False, 10), reasons={0: "timeout"})
    rules = rules_of(config_with(mask_truncated=True))
    assert rules.counts(one) == [False] * 4 and not rules.is_mixed(one)
    assert advantages(config_with(mask_truncated=True), one) == [(0.0, False)] * 4


# --------------------------------------------------------------------------------------------- the collector
def collect(config: Config, kinds: str, wanted_lengths: tuple[int, ...] = (1,)) -> tuple[list[int], dict[str, Any]]:
    """(prompts asked for in each round, facts), where the stream's prompts are mixed (m) or wrong (w) groups."""
    prompts = [Prompt(f"p/{index}", (3, index), f"problem {index}", "ok") for index in range(40)]
    order = [prompt.id for prompt in ShuffledStream(prompts, seed=1).take(len(kinds))]
    kind_of = dict(zip(order, kinds, strict=True))
    count: dict[str, int] = {}

    def respond(prompt: Prompt, rng: Any) -> list[int]:
        number = count[prompt.id] = count.get(prompt.id, 0) + 1
        right = kind_of.get(prompt.id) == "m" and number % 2 == 1
        length = wanted_lengths[(number - 1) % len(wanted_lengths)]
        return [1 if right else 0] * length

    engine = FakeEngine(respond)
    collector = make_collector(
        config,
        alone(),
        engine,
        FakeVerifier({"1": "ok", "11": "ok"}),
        ShuffledStream(prompts, seed=1),
        decode=lambda ids: "".join(map(str, ids)),
        stop_token_ids=(2,),
        method=make_method("dapo"),
        record=lambda step, groups, kept: None,
    )
    log = NoLog()
    groups = collector.collect(0, log)
    assert [one.rollouts[0].prompt.id for one in groups] == [name for name in order if kind_of[name] == "m"][:4]
    return [len(call) // config.rollout.group_size for call in engine.calls], log.values


def test_oversampling_draws_more_and_keeps_the_first() -> None:
    """Factor 1.5 of four: six drawn, five of them mixed, the first four kept; without it a second round is needed."""
    config = config_with(prompts_per_step=4, max_rounds=3, oversampling=1.5)
    asked, facts = collect(config, "mwmmmm")
    assert asked == [6] and (facts["groups"], facts["groups_dropped"], facts["rounds"]) == (4, 2, 1)
    plain, facts = collect(config_with(prompts_per_step=4, max_rounds=3), "mwmmmm")
    assert plain == [4, 2] and facts["rounds"] == 2


def test_later_rounds_are_oversampled_too_up_to_the_first() -> None:
    """Six drawn, one mixed: three are missing, 3 * 6 / 1 expected, times 1.5, at most six again."""
    config = config_with(prompts_per_step=4, max_rounds=2, oversampling=1.5)
    assert collect(config, "wmwwww" + "mmmwww")[0] == [6, 6]
    # four of six mixed would have sufficed; three of six: 1 * 6 / 3 = 2 expected, times 1.5 is 3
    assert collect(config, "mwmwmw" + "wmm")[0] == [6, 3]


def test_the_mean_penalty_is_logged_where_there_is_one() -> None:
    """Lengths 1 and 2 of at most 2, over the last token: 0 and 0.5 in turn."""
    config = config_with(prompts_per_step=4, max_response_tokens=2, overlong_tokens=1)
    _, facts = collect(config, "mmmm", wanted_lengths=(1, 2))
    assert facts["overlong_penalty"] == 0.25 and facts["reward_mean"] == 0.5
    assert "overlong_penalty" not in collect(config_with(prompts_per_step=4), "mmmm")[1]


# --------------------------------------------------------------------------------------------- what makes no sense
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"algorithm": {"name": "grpo"}, "rollout": {"oversampling": 2}},
            "rollout.oversampling = 2.0: grpo keeps every",
        ),
        (
            {"rollout": {"overlong_tokens": 300, "max_response_tokens": 200}},
            "rollout.overlong_tokens = 300: cannot exc",
        ),
        (
            {"rollout": {"overlong_tokens": 100, "max_response_tokens": 200, "mask_truncated": True}},
            "rollout.mask_truncated = True: with overlong_tokens it would reward reaching the limit",
        ),
        (
            {"algorithm": {"name": "opd"}, "rollout": {"overlong_tokens": 100}},
            "rollout.overlong_tokens = 100: opd does not use rewards",
        ),
        (
            {"algorithm": {"name": "dapo", "beta": 0.1}},
            "algorithm.beta = 0.1: dapo has no beta; .* use one of .*grpo, .*sym",
        ),
        ({"algorithm": {"name": "opd", "alpha": 1}}, "algorithm.alpha = 1: opd has no alpha"),
        ({"algorithm": {"name": "mopd", "weight_high": 2}}, "algorithm.weight_high = 2: mopd has no weight_high"),
        ({"algorithm": {"tis_cap": 0.5}}, "algorithm.tis_cap = 0.5: input should be greater than or equal to 1"),
        ({"rollout": {"oversampling": 0.5}}, "rollout.oversampling = 0.5: input should be greater than or equal to 1"),
    ],
)
def test_combinations_without_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"}} | fields)


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_dynamic_sampling_is_the_methods_own_unless_it_is_set(name: str) -> None:
    raw = {"model": {"path": "m"}, "data": {"source": "task:cipher"}, "algorithm": {"name": name}}
    method = find_method(name)
    for value, expected in ((None, method.groups == "mixed"), (True, True), (False, False)):
        rollout = Config.build(raw | {"rollout": {"dynamic_sampling": value}}).rollout
        assert rollout.keeps_mixed_groups(method) is expected


def test_oversampling_goes_with_dynamic_sampling() -> None:
    raw = {"model": {"path": "m"}, "data": {"source": "task:cipher"}}
    mopd = raw | {"algorithm": {"name": "mopd"}, "rollout": {"oversampling": 2, "dynamic_sampling": True}}
    assert Config.build(mopd).rollout.oversampling == 2
    with pytest.raises(UserError, match=r"oversampling = 2.0: rollout.dynamic_sampling: false keeps every group"):
        Config.build(raw | {"rollout": {"oversampling": 2, "dynamic_sampling": False}})


def test_the_correction_reaches_the_objective() -> None:
    config = Config.build(
        {"model": {"path": "m"}, "data": {"source": "task:cipher"}, "algorithm": {"name": "grpo", "tis_cap": 2}}
    )
    objective = make_method(config.algorithm)
    assert objective == make_method("grpo", tis_cap=2.0)


def test_the_parts_that_every_reward_has() -> None:
    """A rule may not use these names for its own: its number would be replaced."""
    assert set(RewardRules(max_tokens=10).parts(group((True, 3)))) == set(OWN_PARTS)
