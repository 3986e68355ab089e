"""Plans carried out: groups that grow, prefixes, continuations, given responses, hints; the ledger and the pool.

With a fake engine and verifier; what a plan asks for is written down here, what becomes of it is the collector's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, FakePolicy, FakeReference, FakeVerifier, NoLog, alone, make_batches, make_collector
from tiny import make_config

from owpo_megatron.data import ShuffledStream
from owpo_megatron.engine.generate_body import generate_body
from owpo_megatron.methods import Ask, Dapo, PlanView
from owpo_megatron.run.rollouts import parse_rollout, plain_rollout
from owpo_megatron.trainer.drawing import sample_seed
from owpo_megatron.trainer.ledger import PromptLedger, SamplePool
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.types import GradingItem, Group, Prompt, Rollout, SampleRequest, Sampling, Verdict
from owpo_megatron.verifiers import KnownVerdicts

PROMPTS = [Prompt(f"p/{index}", (3, index), f"problem {index}", "ok") for index in range(12)]
Round = Callable[[PlanView], list[Ask]]


@dataclass(frozen=True)
class Planned(Dapo):
    """DAPO's loss with a plan of the test's own."""

    name = "planned"
    groups = "all"
    rounds: Sequence[Round] = field(default=())

    def plan(self, view: PlanView) -> list[Ask]:
        return self.rounds[view.round](view) if view.round < len(self.rounds) else []


def first(view: PlanView) -> list[Ask]:
    return [Ask(prompt, 2) for prompt in view.take(2)]


@pytest.fixture(autouse=True, params=[False, True], ids=["rank 0 grades", "workers grade"])
def workers_grade(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan is carried out alike, whoever grades what an engine draws."""
    monkeypatch.setattr(Run, "workers_grade", request.param)


def decode(ids: Sequence[int]) -> str:
    return "".join(map(str, ids))


class GradedEngine(FakeEngine):
    """Draws what a rollout worker sends: each whole response with its verdict, made of the request alone."""

    def _draw(self, request: SampleRequest, sampling: Sampling) -> Rollout:
        drawn = super()._draw(request, sampling)
        (verdict,) = RULE.score([GradingItem.of(drawn, decode)])
        return replace(drawn, verdict=verdict)


class Rest(FakeVerifier):
    """The rule of rank 0, which is asked for what no worker has drawn: given responses."""

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        assert all(item.response == decode(expert(PROMPTS[0]).response_ids) for item in items), items
        return super().score(items)


RULE = FakeVerifier({"12": "ok"})


class Run:
    """A collector with a plan, and what its engine was asked for."""

    workers_grade = False

    def __init__(self, *rounds: Round, respond: Any = None, **parts: Any):
        self.config = make_config(
            Path("unused"),
            rollout={"prompts_per_step": 2, "group_size": 2, "max_response_tokens": 8},
            optimizer={"updates_per_step": 1},
        )
        engine = GradedEngine if self.workers_grade else FakeEngine
        self.engine = engine(respond or (lambda prompt, rng: [rng.randrange(2), 2]))
        self.policy = FakePolicy()
        self.collector = make_collector(
            self.config,
            MainRank(lambda value: value, lambda: [], alone()._sync, lambda error: 0, self.policy),
            self.engine,
            KnownVerdicts(Rest({"12": "ok"})) if self.workers_grade else RULE,
            ShuffledStream(PROMPTS, seed=1),
            decode=decode,
            stop_token_ids=(2,),
            record=lambda step, groups, kept: None,
            method=Planned(rounds=rounds),
            **parts,
        )

    def collect(self, step: int = 0) -> list[Group]:
        return self.collector.collect(step, NoLog())


def test_a_later_round_adds_siblings_with_seeds_of_their_own() -> None:
    run = Run(first, lambda view: [Ask(view.groups[1].rollouts[0].prompt, 3, group=1)])
    groups = run.collect()
    assert [len(group.rollouts) for group in groups] == [2, 5]
    assert [len(call) for call in run.engine.calls] == [4, 3]
    seeds = [rollout.seed for group in groups for rollout in group.rollouts]
    assert seeds == [sample_seed(1, draw, place) for draw, size in ((0, 2), (1, 5)) for place in range(size)]
    assert [len(g.rewards) for g in groups] == [2, 5]


def test_a_round_can_open_a_group_and_add_to_it() -> None:
    def plan(view: PlanView) -> list[Ask]:
        (prompt,) = view.take(1)
        return [Ask(prompt, 2), Ask(prompt, 1, group=0, temperature=0.25, max_tokens=3, origin="baseline")]

    (group,) = Run(plan).collect()
    assert [rollout.origin for rollout in group.rollouts] == ["policy", "policy", "baseline"]


def test_sampling_of_one_ask_reaches_the_engine_alone() -> None:
    run = Run(lambda view: [Ask(p, 1, temperature=t) for p, t in zip(view.take(2), (None, 0.25), strict=True)])
    run.collect()
    (plain, cool) = run.engine.calls[0]
    assert plain.sampling is None and cool.sampling is not None and cool.sampling.temperature == 0.25
    body = generate_body([plain, cool], Sampling(8, 1.0))
    assert [one["temperature"] for one in body["sampling_params"]] == [1.0, 0.25]
    assert [one["max_new_tokens"] for one in body["sampling_params"]] == [8, 8]


def test_a_prefix_is_graded_and_not_trained_on() -> None:
    """The response 1 2 is right as a whole: the prefix 1, the rest 2."""
    run = Run(lambda view: [Ask(prompt, 1, prefix=(1,)) for prompt in view.take(1)], respond=lambda prompt, rng: [2])
    (group,) = run.collect()
    (rollout,) = group.rollouts
    assert group.rewards == (1.0,) and rollout.response_ids == (2,)
    (request,) = run.engine.calls[0]
    assert request.prompt.token_ids[-1] == 1 and request.sampling is not None
    assert request.sampling.max_tokens == 7, "the prefix counts towards the longest response"
    (sample,) = batches(run).samples([group], 0)
    assert sample.prompt_ids == (*PROMPTS[int(rollout.prompt.id[2:])].token_ids, 1) and sample.response_ids == (2,)


def test_a_continued_response_is_one_response() -> None:
    """Pieces 1 and 2: two tokens with the log-probs of both draws, graded as a whole; the place in the group stays."""
    run = Run(
        lambda view: [Ask(prompt, 2, max_tokens=1) for prompt in view.take(1)],
        lambda view: [Ask(view.groups[0].rollouts[1].prompt, 1, group=0, extends=1, max_tokens=1)],
        respond=lambda prompt, rng: [2 if prompt.prefix else 1],
    )
    (group,) = run.collect()
    whole, piece = group.rollouts[1], run.engine.calls[1][0]
    assert whole.response_ids == (1, 2) and len(whole.behaviour_logp) == 2 and whole.finish_reason == "stop"
    assert piece.prompt.token_ids == (*whole.prompt.token_ids, 1) and whole.prompt.prefix == 0
    assert group.rewards == (0.0, 1.0) and group.rollouts[0].response_ids == (1,)


def expert(prompt: Prompt) -> Rollout:
    return Rollout(prompt, (1, 2), (), -1, "stop", -1, origin="expert")


def test_a_given_response_is_graded_and_costs_no_draw() -> None:
    run = Run(first, lambda view: [Ask(g.rollouts[0].prompt, given=(expert(g.rollouts[0].prompt),), group=0)
                                   for g in view.groups[:1]])  # fmt: skip
    log = NoLog()
    groups = run.collector.collect(0, log)
    assert len(run.engine.calls) == 1 and groups[0].rewards[2] == 1.0 and groups[0].rollouts[2].origin == "expert"
    own = [reward for group in groups for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
           if rollout.origin == "policy"]  # fmt: skip
    assert log.values["reward_mean"] == sum(own) / 4, "the policy's own responses"


def test_a_hinted_response_can_be_trained_on_without_the_hint() -> None:
    """Then its old log-probs are those under the hint, as the engine reported them, and no pass replaces them."""

    def plan(view: PlanView) -> list[Ask]:
        (prompt,) = view.take(1)
        return [Ask(prompt, 1), Ask(prompt.begun(()), 1, group=0, trained_on=replace(prompt, token_ids=(9, 9)))]

    run = Run(plan)
    (group,) = run.collect()
    plain, hinted = group.rollouts
    assert not plain.keeps_old and hinted.keeps_old and hinted.trained_ids == (9, 9)
    (minibatch,) = batches(run).prepare([group], 0, NoLog())
    assert minibatch[1].prompt_ids == (9, 9)
    assert minibatch[1].old_logp is not None and minibatch[0].old_logp is not None, "all of a pack or none"
    assert minibatch[1].old_logp.tolist() == torch.tensor(hinted.behaviour_logp).tolist()
    assert minibatch[0].old_logp.tolist() == run.policy.logprobs(minibatch[:1])[0].tolist()


def test_a_baseline_is_out_of_the_loss() -> None:
    def plan(view: PlanView) -> list[Ask]:
        return [ask for at, p in enumerate(view.take(1)) for ask in (Ask(p, 1, origin="baseline"), Ask(p, 2, group=at))]

    run = Run(plan)
    assert [sample.masked for sample in batches(run).samples(run.collect(), 0)] == [True, False, False]


def batches(run: Run) -> Any:
    return make_batches(run.config, make_stages(), Planned(), run.policy, FakeReference(run.policy))


def make_stages() -> StagePlan:
    config = make_config(Path("unused"))
    return StagePlan.of(config.reference, config.optimizer.steps, False)


def test_a_plan_looks_at_the_policys_entropies() -> None:
    """FakePolicy: the entropy of a token is a tenth of its id."""
    seen: list[Any] = []

    def look(view: PlanView) -> list[Ask]:
        seen.extend(view.statistics(view.groups[0].rollouts))
        return []

    run = Run(first, look)
    groups = run.collect()
    expected = [torch.tensor(one.response_ids) / 10 for one in groups[0].rollouts]
    assert [one.entropy_L for one in seen] == [one.tolist() for one in expected]


def test_the_ledger_counts_visits_and_successes_by_hand() -> None:
    """Rewards 1 0 then 1 1: mean 3/4, squared deviations 3/4; with a discount of 1/2: right 1/2 + 2, wrong 1/2."""
    ledger = PromptLedger(forgetting=0.5)
    ledger.visit("p", [1.0, 0.0], step=3)
    ledger.visit("p", [1.0, 1.0], step=7)
    record = ledger.record("p")
    assert record is not None
    assert (record.visits, record.responses, record.last_step) == (2, 4, 7)
    assert (record.mean, record.squares) == pytest.approx((0.75, 0.75))
    assert (record.right, record.wrong) == (2.5, 0.5)
    again = PromptLedger(forgetting=0.5)
    again.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert again.record("p") == record and again.record("q") is None


def test_groups_carry_the_record_from_before_their_step() -> None:
    run = Run(lambda view: [Ask(PROMPTS[0], 2)], memory=(PromptLedger(),))
    before = [run.collect(step)[0].past for step in range(3)]
    assert before[0] is None
    assert [(one.visits, one.responses, one.last_step) for one in before[1:] if one] == [(1, 2, 0), (2, 4, 1)]


def test_the_pool_keeps_the_newest_right_responses_with_their_log_probs() -> None:
    pool = SamplePool(per_prompt=2)
    rollouts = [Rollout(PROMPTS[0], (1, 2), (-0.25 * n, -0.5), n, "stop", n) for n in range(4)]
    right, wrong = Verdict(True, "ok"), Verdict(False, "wrong")
    pool.add([Group(tuple(rollouts), (right, wrong, right, right), (1.0, 0.0, 1.0, 1.0))])
    stored = pool.stored("p/0")
    assert [one.seed for one in stored] == [2, 3]
    assert all(one.origin == "replay" and one.keeps_old for one in stored)
    again = SamplePool(per_prompt=2)
    again.load_state_dict(json.loads(json.dumps(pool.state_dict())))
    assert again.stored("p/0") == stored and again.stored("p/1") == ()


def test_a_stored_response_is_not_stored_again() -> None:
    pool = SamplePool(per_prompt=2)
    stored = Rollout(PROMPTS[0], (1,), (-0.1,), 0, "stop", 0, origin="replay", keeps_old=True)
    pool.add([Group((stored,), (Verdict(True, "ok"),), (1.0,))])
    assert pool.stored("p/0") == ()


def test_a_restored_collector_asks_for_the_same() -> None:
    """Ledger, pool, seeds and random choices of the plan are all in the checkpoint, or functions of the step."""

    def wander(view: PlanView) -> list[Ask]:
        prompts = view.take(3)
        chosen = view.random.sample(prompts, 2)
        record = view.record(chosen[0])
        known = 0 if record is None else record.visits
        given = tuple(view.stored(chosen[1])[:1])
        return [Ask(chosen[0], 2 + known), Ask(chosen[1], 1, given=given)]

    def make() -> Run:
        return Run(wander, memory=(PromptLedger(), SamplePool(3)))

    straight = make()
    for step in range(6):
        straight.collect(step)
    state = json.loads(json.dumps(straight.collector.state_dict()))
    expected = [straight.collect(step) for step in (6, 7, 8)]
    assert any(one.origin == "replay" for groups in expected for group in groups for one in group.rollouts)
    resumed = make()
    resumed.collector.load_state_dict(state)
    assert [resumed.collect(step) for step in (6, 7, 8)] == expected


def test_a_plan_without_end_is_refused() -> None:
    run = Run(*[first] * 1001)
    with pytest.raises(AssertionError, match=r"planned\.plan asks without end"):
        run.collect()


@pytest.mark.parametrize(
    "rollout",
    [
        Rollout(PROMPTS[0], (1, 2), (-0.5, -0.125), 3, "stop", 7),
        Rollout(PROMPTS[0].begun((4,)), (1,), (), -1, "length", -1, "expert", True, (3, 4)),
    ],
)
def test_rollouts_on_disk_keep_what_only_some_methods_set(rollout: Rollout) -> None:
    plain = plain_rollout(rollout)
    assert parse_rollout(json.loads(json.dumps(plain))) == rollout
    assert ("origin" in plain) == (rollout.origin != "policy") and ("prefix" in plain["prompt"]) == (
        rollout.prompt.prefix > 0
    )


def test_requests_without_a_plan_of_their_own_are_as_before() -> None:
    body = generate_body([SampleRequest(PROMPTS[0], 5)], Sampling(8, 0.7, stop_token_ids=(2,)))
    assert body["sampling_params"] == {
        "max_new_tokens": 8, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "stop_token_ids": [2], "sampling_seed": 5,
    }  # fmt: skip
