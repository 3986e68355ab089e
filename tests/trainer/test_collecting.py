"""RolloutCollector with a fake engine: what is asked for, what is kept, and that both can be repeated."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, FakeVerifier, NoLog, alone, make_collector
from tiny import make_config

from owpo_megatron.config import DataConfig, SourceConfig
from owpo_megatron.data import ShuffledStream
from owpo_megatron.errors import UserError
from owpo_megatron.methods import make_method
from owpo_megatron.trainer.drawing import sample_seed
from owpo_megatron.trainer.mixture import Mixture
from owpo_megatron.types import Group, Prompt, Rollout
from owpo_megatron.verifiers import refuse_failed_grading

PROMPTS = [Prompt(f"p/{index}", (3, index), f"problem {index}", "ok") for index in range(40)]
RIGHT, WRONG, SLOW = 1, 0, 7
REASONS = {"1": "ok", "0": "wrong", "7": "timeout"}


class Run:
    """A collector over the forty prompts, and what it recorded."""

    def __init__(self, respond: Any, dynamic: bool = True, **rollout: Any):
        sizes = {"prompts_per_step": 4, "group_size": 4, "max_rounds": 3} | rollout
        self.config = make_config(Path("unused"), rollout=sizes, optimizer={"updates_per_step": 1})
        self.engine = FakeEngine(respond)
        self.recorded: dict[int, Sequence[Rollout]] = {}
        self.kept: dict[int, Sequence[Group]] = {}
        self.collector = make_collector(
            self.config,
            alone(),
            self.engine,
            FakeVerifier(REASONS),
            ShuffledStream(PROMPTS, seed=1),
            decode=lambda ids: "".join(map(str, ids)),
            stop_token_ids=(2,),
            method=make_method("dapo" if dynamic else "grpo"),
            record=self.record,
        )

    def record(self, step: int, groups: Sequence[Group], kept: Sequence[Group]) -> None:
        self.recorded[step] = [rollout for group in groups for rollout in group.rollouts]
        self.kept[step] = kept

    def collect(self, step: int = 0) -> tuple[list[Group], dict[str, Any]]:
        log = NoLog()
        return self.collector.collect(step, log), log.values

    def rounds(self) -> list[int]:
        """Prompts asked for in each call of the engine."""
        return [len(call) // self.config.rollout.group_size for call in self.engine.calls]


def coin(prompt: Prompt, rng: Any) -> list[int]:
    return [int(rng.random() < 0.4)]


def by_prompt(kinds: Sequence[str]) -> Any:
    """Prompts in the order of the stream: "m" has mixed rewards, "r" all right, "w" all wrong."""
    order = [prompt.id for prompt in ShuffledStream(PROMPTS, seed=1).take(len(kinds))]
    kind_of = dict(zip(order, kinds, strict=True))
    count: dict[str, int] = {}

    def respond(prompt: Prompt, rng: Any) -> list[int]:
        count[prompt.id] = count.get(prompt.id, 0) + 1
        kind = kind_of.get(prompt.id, "w")
        return [RIGHT if kind == "r" or (kind == "m" and count[prompt.id] % 2) else WRONG]

    return respond


def test_only_mixed_groups_are_kept_in_the_order_of_the_stream() -> None:
    """Round 1: m w m r gives 2 of 4. Round 2 asks for (4 - 2) * 4 / 2 = 4: w m m m, of which the last is too many."""
    run = Run(by_prompt("mwmrwmmm"))
    groups, facts = run.collect()
    order = [prompt.id for prompt in ShuffledStream(PROMPTS, seed=1).take(8)]
    assert [group.rollouts[0].prompt.id for group in groups] == [order[index] for index in (0, 2, 5, 6)]
    assert run.rounds() == [4, 4]
    assert all(set(group.rewards) == {0.0, 1.0} for group in groups)
    assert (facts["groups"], facts["groups_dropped"], facts["rounds"], facts["prompts_seen"]) == (4, 4, 2, 8)
    assert facts["reward_mean"] == (5 * 0.5 + 1 * 1.0 + 2 * 0.0) / 8, "of all groups, the dropped ones included"


def test_the_next_round_is_scaled_by_what_was_kept() -> None:
    """3 of 4 kept: one is missing, and ceil(1 * 4 / 3) = 2 are asked for."""
    run = Run(by_prompt("mmmwmw"))
    run.collect()
    assert run.rounds() == [4, 2]


def test_rounds_are_bounded_and_a_step_may_be_short() -> None:
    run = Run(by_prompt("mwwwwwwwwwwwww"))
    groups, facts = run.collect()
    assert run.rounds() == [4, 4, 4]
    assert len(groups) == 1 and facts["rounds"] == 3 and facts["groups_dropped"] == 11


def test_nothing_kept_is_a_step_without_groups() -> None:
    run = Run(by_prompt("w"))
    groups, facts = run.collect()
    assert groups == [] and facts["reward_mean"] == 0.0 and facts["groups"] == 0
    assert len(run.recorded[0]) == 3 * 4 * 4


def test_without_dynamic_sampling_every_group_is_kept() -> None:
    run = Run(by_prompt("wwrm"), dynamic=False)
    groups, facts = run.collect()
    assert run.rounds() == [4] and len(groups) == 4
    assert (facts["groups_dropped"], facts["rounds"]) == (0, 1)


def test_everything_that_was_generated_is_recorded() -> None:
    run = Run(by_prompt("mwmrwmmm"))
    run.collect(step=5)
    asked = [(request.prompt.id, request.seed) for call in run.engine.calls for request in call]
    assert [(rollout.prompt.id, rollout.seed) for rollout in run.recorded[5]] == asked
    assert len(asked) == 32


def test_seeds_are_distinct_and_belong_to_the_place_in_the_stream() -> None:
    run = Run(coin)
    for step in range(6):
        run.collect(step)
    seeds = [request.seed for call in run.engine.calls for request in call]
    assert len(set(seeds)) == len(seeds) > 96
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [sample_seed(1, draw, sibling) for draw in range(len(seeds) // 4) for sibling in range(4)]
    assert sample_seed(1, 0, 1) != sample_seed(2, 0, 1) != sample_seed(1, 1, 0)


def test_a_prompt_that_comes_again_gets_other_seeds() -> None:
    """An epoch has 40 prompts."""
    run = Run(coin, dynamic=False, prompts_per_step=40)
    first, _ = run.collect(0)
    second, _ = run.collect(1)
    seeds = [{g.rollouts[0].prompt.id: [r.seed for r in g.rollouts] for g in groups} for groups in (first, second)]
    assert seeds[0].keys() == seeds[1].keys()
    assert not any(set(seeds[0][name]) & set(seeds[1][name]) for name in seeds[0])


def test_a_restored_cursor_goes_on_with_the_same_samples() -> None:
    straight = Run(coin)
    for step in range(3):
        straight.collect(step)
    state = straight.collector.state_dict()
    expected = [straight.collect(step) for step in (3, 4)]
    resumed = Run(coin)
    resumed.collector.load_state_dict(state)
    assert [resumed.collect(step) for step in (3, 4)] == expected


@pytest.mark.parametrize(("mask", "kept"), [(True, 0), (False, 4)])
def test_failed_verdicts_make_no_group_mixed(mask: bool, kept: int) -> None:
    """Three right answers and a time-out: mixed only where a failure counts as wrong."""
    count = iter(range(10**6))
    run = Run(lambda prompt, rng: [SLOW if next(count) % 4 == 1 else RIGHT])
    run.collector._rules = replace(run.collector._rules, mask_failures=mask)
    groups, facts = run.collect()
    assert len(groups) == kept
    assert facts["verifier"]["timeout"] * 3 == facts["verifier"]["ok"]


def test_facts_of_the_responses() -> None:
    def respond(prompt: Prompt, rng: Any) -> list[int]:
        return [RIGHT] * 9 if rng.random() < 0.5 else [WRONG, 2]

    run = Run(respond, dynamic=False)
    groups, facts = run.collect()
    lengths = [len(rollout.response_ids) for group in groups for rollout in group.rollouts]
    assert set(lengths) == {2, 8}, "8 is the limit of the config"
    assert facts["response_length"] == sum(lengths) / 16 and facts["tokens_generated"] == sum(lengths)
    assert facts["truncated_share"] == lengths.count(8) / 16


def test_verdicts_stay_with_their_responses_in_whatever_order_those_come() -> None:
    """Posts of three that end from the last to the first."""
    run = Run(coin)
    draw, graded = run.engine.generate, []

    def generate(requests: Any, sampling: Any, progress: Any = None, finished: Any = None) -> list[Rollout]:
        rollouts = draw(requests, sampling)
        for first in reversed(range(0, len(rollouts), 3)):
            finished(first, rollouts[first : first + 3])
            graded.append(len(rollouts[first : first + 3]))
        return rollouts

    run.engine.generate = generate  # type: ignore[method-assign]
    groups, _ = run.collect()
    assert sum(graded) == sum(run.rounds()) * 4
    for group in groups:
        for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
            assert verdict.reason == REASONS[str(rollout.response_ids[0])]


def test_a_step_without_one_verdict_stops_the_run() -> None:
    """Masked samples train nothing: a rule that is down would otherwise waste the run in silence."""
    run = Run(lambda prompt, rng: [SLOW])
    run.collector._check_verdicts = partial(refuse_failed_grading, rule="http://x")
    with pytest.raises(UserError, match=r"verifier.rule = http://x: no answer could be graded \(16 timeout\)"):
        run.collect()


def test_texts_that_end_a_response_reach_the_engine() -> None:
    run = Run(coin, stop=["Question:"])
    assert run.collector._sampling.stop == ("Question:",)


def test_checkpoints_keep_the_day_of_the_prompts() -> None:
    run = Run(coin)
    assert "date" not in run.collector.state_dict()
    run.collector._date = datetime.date(2026, 2, 3)
    assert run.collector.state_dict()["date"] == "2026-02-03"


def test_sources_and_domains_have_metrics_of_their_own():
    def respond(prompt: Prompt, rng: Any) -> list[int]:
        return [RIGHT] if int(prompt.id[2:]) % 4 == 0 else [WRONG, WRONG]

    run = Run(respond, dynamic=False)
    mixed = [replace(one, source=place % 2, domain="abc"[place % 3]) for place, one in enumerate(PROMPTS)]
    run.collector._stream = ShuffledStream(mixed, seed=1)
    _, plain = run.collect()
    assert "sources" not in plain and "domains" not in plain
    run.collector._facts._mixture = Mixture(("even", "odd"), {"a", "b", "c"})
    groups, facts = run.collect(1)
    even = [group for group in groups if group.rollouts[0].prompt.source == 0]
    assert 0 < len(even) < len(groups)
    rewards = [reward for group in even for reward in group.rewards]
    assert facts["sources"]["even"]["reward_mean"] == sum(rewards) / len(rewards)
    assert facts["sources"]["odd"] == {"reward_mean": 0, "responses": 4 * (4 - len(even)), "response_length": 2}
    assert facts["domains"].keys() == {group.rollouts[0].prompt.domain for group in groups}
    total = sum(one["reward_mean"] * one["responses"] for one in facts["sources"].values())
    assert total / 16 == pytest.approx(facts["reward_mean"])


def test_names_of_sources_are_short_and_differ():
    sources = ["a/train.jsonl", "b/train.jsonl", "hub:openai/gsm8k@main:x/*.parquet", "task:cipher"]
    data = DataConfig(sources=[SourceConfig(source=one) for one in sources])
    assert data.source_names == ["train", "train#2", "gsm8k", "cipher"] and DataConfig(source="a").source_names == []
