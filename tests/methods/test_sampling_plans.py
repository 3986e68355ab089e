"""Sampling methods: their plans against numbers worked by hand, and each one carried out and resumed.

The engine is a fake whose responses depend on prompt and seed; what the real one makes of a request is tested with it
(tests/e2e). Numbers without a source in the test's own words are those of the papers' code, worked by hand.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, FakePolicy, FakeReference, FakeSync, FakeVerifier, NoLog, make_batches, make_collector
from tiny import make_config

from owpo_megatron.config import Config
from owpo_megatron.data import ShuffledStream
from owpo_megatron.errors import UserError
from owpo_megatron.methods import Ask, ChunkBatch, Method, PlanView, SampleView, StepView, catalogue, make_method
from owpo_megatron.methods.sampling.knapsack import worth
from owpo_megatron.trainer.ledger import PromptLedger, SamplePool
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.types import Group, Prompt, PromptRecord, Rollout

PROMPTS = [Prompt(f"p/{index}", (3, index), f"problem {index}", "12") for index in range(24)]
PLANNED = sorted(name for name, method in catalogue().items() if method.plan is not Method.plan)
EOS = 2


@dataclass(frozen=True)
class Solved:
    """Solutions of a test: every prompt has these hints and whole responses; a hint begins the response."""

    texts: tuple[str, ...] = ("12",)
    levels: tuple[str, ...] = ("1", "12")

    def hints(self, prompt: Prompt) -> Sequence[str]:
        return self.levels

    def solutions(self, prompt: Prompt) -> Sequence[str]:
        return self.texts

    def hinted(self, prompt: Prompt, hint: str, words: str = "") -> Prompt:
        return prompt.begun([int(symbol) for symbol in hint])

    def expert(self, prompt: Prompt, solution: str) -> Rollout:
        return Rollout(prompt, tuple(int(one) for one in solution), (), -1, "stop", -1, origin="expert")

    def answer_after(self, prompt: Prompt, solution: str) -> Rollout | None:
        return None if "12" not in solution else replace(self.expert(prompt, "12"), prompt=prompt.begun((9,)))

    def answered(self, rollout: Rollout) -> tuple[Rollout, Rollout] | None:
        """The answer's tokens 1 2 after the response, and alone after another token."""
        if len(rollout.response_ids) < 3:
            return None
        bare = replace(rollout, prompt=rollout.prompt.begun((9,)), response_ids=(7, 7))
        return replace(rollout, response_ids=(rollout.response_ids[0], 2)), bare


class Run:
    """A collector that follows the plan of a method, over 24 prompts whose right response is 1 2."""

    def __init__(self, method: Method, respond: Any = None, size: int = 4, solutions: Any = None, **rollout: Any):
        sizes = {"prompts_per_step": 2, "group_size": size, "max_response_tokens": 8, "max_rounds": 3} | rollout
        self.config = make_config(Path("unused"), rollout=sizes, optimizer={"updates_per_step": 1})
        self.engine = FakeEngine(respond or coin)
        self.policy = FakePolicy()
        self.method = method
        ledger = PromptLedger(method.forgetting, method.first_counts) if method.keeps_ledger else None
        pool = SamplePool(method.stores_responses) if method.stores_responses else None
        self.collector = make_collector(
            self.config,
            MainRank(lambda value: value, lambda: [], FakeSync(), lambda error: 0, self.policy),
            self.engine,
            FakeVerifier({"12": "ok"}),
            ShuffledStream(PROMPTS, seed=1),
            decode=lambda ids: "".join(map(str, ids)),
            stop_token_ids=(EOS,),
            record=lambda step, groups, kept: None,
            method=method,
            memory=(ledger, pool, solutions or Solved()),
        )

    def collect(self, step: int = 0) -> list[Group]:
        return self.collector.collect(step, NoLog())

    def minibatch(self, groups: Sequence[Group]) -> list[Any]:
        stages = StagePlan.of(self.config.reference, self.config.optimizer.steps, False)
        batches = make_batches(self.config, stages, self.method, self.policy, FakeReference(self.policy))
        return list(itertools.chain(*batches.prepare(groups, 0, NoLog())))


def coin(prompt: Prompt, rng: Any) -> list[int]:
    """Right in a third of the cases; what a hint began is finished."""
    if prompt.prefix:
        return [2]
    return [1, 2] if rng.random() < 0.33 else [1, 1, 1, 2]


def wrong(prompt: Prompt, rng: Any) -> list[int]:
    return [2] if prompt.prefix else [1, 1, 2]


def test_there_are_methods_with_a_plan() -> None:
    assert len(PLANNED) >= 12


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_ends_and_a_resumed_run_asks_for_the_same(name: str) -> None:
    """Ten steps straight, and four after a checkpoint at six; what is trained on is finite and of its prompts."""
    settings = {"warmup": 0} if name == "scaf_grpo" else {}
    straight = Run(make_method(name, **settings))
    for step in range(6):
        straight.collect(step)
    state = json.loads(json.dumps(straight.collector.state_dict()))
    expected = [straight.collect(step) for step in range(6, 10)]
    resumed = Run(make_method(name, **settings))
    resumed.collector.load_state_dict(state)
    assert [resumed.collect(step) for step in range(6, 10)] == expected
    trained = straight.minibatch(expected[0])
    assert all(math.isfinite(float(torch.as_tensor(sample.advantage).mean())) for sample in trained)
    assert all(sample.response_ids for sample in trained)


@pytest.mark.parametrize("name", PLANNED)
def test_a_short_step_is_no_error(name: str) -> None:
    """Every response is right, or every one wrong and beyond help: nothing to learn for most, and no exception."""
    for respond in (lambda prompt, rng: [2] if prompt.prefix else [1, 2], lambda prompt, rng: [1, 1]):
        run = Run(make_method(name), respond)
        run.minibatch(run.collect(60))


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_that_asks_for_more_than_turns_says_that_it_takes_no_episodes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rlpr asks for whole responses alone, and judges them by the answer that follows, which no turn has."""
    settings: dict[str, Any] = {"scaf_grpo": {"warmup": 0}, "ead": {"warmup": 2, "piece": 2}}.get(name, {})
    method = make_method(name, **settings)
    asked: list[Ask] = []
    plan = type(method).plan

    def noted(self: Method, view: PlanView) -> Sequence[Ask]:
        asks = plan(self, view)
        asked.extend(asks)
        return asks

    monkeypatch.setattr(type(method), "plan", noted)
    run = Run(method, solutions=Solved(("1212",)))
    for step in range(10):
        run.collect(step)
    assert asked
    more = any(
        one.prefix or one.given or one.prompt.prefix or one.trained_on is not None or one.extends is not None
        for one in asked
    )
    assert method.takes_episodes is not (more or name == "rlpr")
    layers = {"model": {"path": "."}, "data": {"source": "task:lookup"}, "environment": {"name": "lookup"}}
    for section in ({"algorithm": {"name": name}}, {"rollout": {"plan": name}}):
        if method.takes_episodes:
            Config.build(layers | section)
        else:
            with pytest.raises(UserError, match=f"= {name}: .*episodes"):
                Config.build(layers | section)


# ---------------------------------------------------------------------------------------------- how many siblings
def test_dars_by_hand() -> None:
    """G = 8, p = 1/4: S = 3/8, G S = 3, peak 4: ceil(1 / 0.375) = 3; HW: (1.5 * 4 - 3) / 0.375 = 8. p >= 1/2: none.
    p = 0 counts as 1/16: S = 15/128, (4 - 0.9375) / S = 26.1."""
    equal, hard = make_method("dars", hard_first=False), make_method("dars")
    assert [equal.more(rate, 8) for rate in (0.25, 0.5, 0.75, 0.0)] == [3, 0, 0, 27]
    assert [hard.more(rate, 8) for rate in (0.25, 0.5, 0.75)] == [8, 0, 0]
    assert make_method("dars", most=12).more(0.0, 8) == 4


def test_dars_adds_siblings_to_their_group() -> None:
    """G = 4, all wrong: p = 1/8, S = 7/32, HW: (1.75 * 2 - 0.875) / S = 12 more."""
    groups = Run(make_method("dars"), wrong).collect()
    assert [len(group.rollouts) for group in groups] == [16, 16]


def test_knapsack_by_hand() -> None:
    """n = 2, p = 1/2: (1 - 1/4 - 1/4) * 1/2 * 1/4 = 0.0625. Equal rates share alike; a sure prompt gets the least."""
    assert worth(0.5, 2) == 0.0625
    knapsack = make_method("knapsack_rl")
    assert knapsack.allocation([0.3] * 4, 8) == [8] * 4
    assert knapsack.allocation([1.0, 0.3], 8) == [2, 14]
    assert knapsack.allocation([None, 1.0, 0.3], 8) == [8, 2, 14]
    assert knapsack.allocation([1.0, 0.0], 8) == [8, 8], "nothing to gain anywhere: shared alike"


@pytest.mark.parametrize("rates", [(0.1, 0.5, 0.9), (0.05, 0.2, 0.4), (0.6, 0.6, 0.99)])
def test_knapsack_is_the_optimum(rates: tuple[float, ...]) -> None:
    """Brute force over all ways to give 9 siblings to three prompts, at least 2 each."""
    ways = [way for way in itertools.product(range(2, 6), repeat=3) if sum(way) == 9]
    best = max(sum(map(worth, rates, way)) for way in ways)
    found = make_method("knapsack_rl").allocation(rates, 3)
    assert sum(found) == 9 and sum(map(worth, rates, found)) == pytest.approx(best, abs=1e-15)


def test_knapsack_learns_from_the_ledger() -> None:
    """First epoch: group_size each. Later the budget stays, and siblings move."""

    def respond(prompt: Prompt, rng: Any) -> list[int]:
        return [1, 2] if prompt.token_ids[1] % 3 == 0 else coin(prompt, rng)

    run = Run(make_method("knapsack_rl"), respond, prompts_per_step=12)
    counts = [[len(group.rollouts) for group in run.collect(step)] for step in range(4)]
    assert counts[0] == counts[1] == [4] * 12
    assert all(sum(one) == 48 and min(one) == 2 and max(one) > 4 for one in counts[2:])


# ---------------------------------------------------------------------------------------------- baselines
def test_remax_by_hand() -> None:
    """R = 1 0 1 with a greedy response that is right: A = 0 -1 0; the greedy one itself: 0, and out of the loss."""
    step = StepView([1.0, 0.0, 1.0, 1.0], [True] * 4, [0] * 4, [2] * 4, origin_N=["policy"] * 3 + ["baseline"])
    assert list(make_method("remax").advantages(step)) == [0.0, -1.0, 0.0, 0.0]
    run = Run(make_method("remax"))
    groups = run.collect()
    assert [[one.origin for one in group.rollouts] for group in groups] == [["policy"] * 4 + ["baseline"]] * 2
    greedy = [request for request in run.engine.calls[0] if request.sampling is not None]
    assert [request.sampling.temperature for request in greedy if request.sampling] == [0.0, 0.0]
    assert [sample.masked for sample in run.minibatch(groups)] == ([False] * 4 + [True]) * 2


def test_spo_by_hand() -> None:
    """Counts (2, 6), discount 0.9, a right answer: (2.8, 5.4), p = 0.34146. Whitened: (R - p - mean) / std."""
    ledger = PromptLedger(0.9, (2.0, 6.0))
    ledger.visit("p", [1.0], 0)
    record = ledger.record("p")
    assert record is not None and record.right / (record.right + record.wrong) == pytest.approx(2.8 / 8.2)
    past = [None, PromptRecord(1, 1, 1.0, 0.0, 0, 3.0, 1.0)]
    step = StepView([1.0, 0.0], [True] * 2, [0, 1], [2, 2], past_N=past)  # A = 0.5, -0.75: mean -0.125, std 0.625
    assert list(make_method("spo").advantages(step)) == pytest.approx([1.0, -1.0], abs=1e-6)


def test_spo_asks_as_many_prompts_as_a_group_method_has_siblings_and_prefers_uncertain_ones() -> None:
    run = Run(make_method("spo"))
    assert [len(group.rollouts) for group in run.collect()] == [1] * 8
    spo = make_method("spo")
    assert spo.weight(None) == 0.55
    assert spo.weight(PromptRecord(1, 1, 1.0, 0.0, 0, 9.0, 1.0)) == pytest.approx(0.35)
    picky = Run(make_method("spo", candidates=2.0), lambda prompt, rng: [1, 2])
    ids = [group.rollouts[0].prompt.id for group in picky.collect()]
    assert len(set(ids)) == 8 and picky.collector.state_dict()["stream"]["position"] == 16


# ---------------------------------------------------------------------------------------------- help
def test_without_a_failed_prompt_hints_change_nothing() -> None:
    """GHPO and Scaf-GRPO are then the plain plan, request by request."""

    def right(prompt: Prompt, rng: Any) -> list[int]:
        return [1, 2]

    plain = Run(make_method("grpo"), right)
    for name in ("ghpo", "scaf_grpo"):
        helped = Run(make_method(name, **({"warmup": 0} if name == "scaf_grpo" else {})), right)
        assert helped.collect() == plain.collect(0)
        assert helped.engine.calls[0] == plain.engine.calls[0]
        plain = Run(make_method("grpo"), right)


def test_ghpo_shows_more_and_more_of_the_solution() -> None:
    """Parts of 8 characters: 2, 4, 6. Four suffice here: the third draw does not happen."""
    solution = "11111112"

    def respond(prompt: Prompt, rng: Any) -> list[int]:
        return [1] * 3 + [2] if prompt.prefix == 4 else [1]

    run = Run(make_method("ghpo"), respond, solutions=Solved(texts=(solution,)))
    run.collector._verifier = FakeVerifier({solution: "ok"})
    groups = run.collect()
    assert [call[0].prompt.prefix for call in run.engine.calls] == [0, 2, 4]
    assert all(group.rewards == (1.0,) * 4 for group in groups)
    assert {rollout.prompt.prefix for group in groups for rollout in group.rollouts} == {4}


def test_scaf_grpo_takes_the_least_hint_that_works() -> None:
    run = Run(make_method("scaf_grpo", warmup=3), wrong)
    assert all(group.rewards == (0.0,) * 4 for group in run.collect(2))
    groups = run.collect(3)
    assert all(group.rewards == (1.0, 0.0, 0.0, 0.0) for group in groups)
    assert [group.rollouts[0].prompt.prefix for group in groups] == [1, 1]


def test_guide_trains_on_the_prompt_without_the_hint() -> None:
    """One of two hinted responses is right; the sample has the plain prompt, and the engine's log-probs as old ones."""

    def respond(prompt: Prompt, rng: Any) -> list[int]:
        return [2 if rng.random() < 0.5 else 1] if prompt.prefix else [1, 1]

    run = Run(make_method("guide"), respond)
    groups = [group for step in range(3) for group in run.collect(step)]
    assert groups and all(set(group.rewards) == {0.0, 1.0} for group in groups)
    for sample, rollout in zip(run.minibatch(groups), [one for g in groups for one in g.rollouts], strict=True):
        assert sample.keeps_old and len(sample.prompt_ids) == 2 and len(rollout.prompt.token_ids) == 3
        assert sample.old_logp is not None
        assert sample.old_logp.tolist() == torch.tensor(rollout.behaviour_logp).tolist()


def test_guide_by_hand() -> None:
    """r = 1/2 and 1 of hinted tokens: the 90 % quantile is 0.95. r / (r + 0.95) A; without hinted tokens: PPO."""
    guide = make_method("guide")
    now, old = torch.tensor([0.5, 1.0]).log(), torch.zeros(2)
    views = [SampleView(now, old, None, None, torch.ones(2), 1.0, 0, True, off_policy=True)]
    assert guide.prepare(views)[0]["gamma"] == pytest.approx(0.95)
    batch = ChunkBatch(old, old, torch.tensor([1.0, -1.0]), torch.ones(2, dtype=torch.bool),
                       given={"gamma": torch.tensor(0.95)}, off_policy_C=torch.tensor([True, False]))  # fmt: skip
    value = guide.terms(now, batch).value_C
    assert value.tolist() == pytest.approx([0.5 / 1.45, -1.0])


def test_ead_by_hand() -> None:
    """d = 25: 2.2 - exp(t / 500): 1.2 at 0, 2.2 - e at 500, so 0.1 from 371 on; d = 50 after five steps."""
    ead = make_method("ead", warmup=0)
    assert ead.temperature(0, 0) == pytest.approx(1.2)
    assert ead.temperature(200, 0) == pytest.approx(2.2 - math.exp(0.4))
    assert ead.temperature(371, 0) == ead.temperature(10**6, 0) == 0.1
    assert ead.temperature(200, 5) == pytest.approx(2.2 - math.exp(0.2))
    assert make_method("ead").temperature(9, 0) == 1.0


def test_ead_draws_a_response_in_pieces() -> None:
    """Warm-up of 2, pieces of 3, at most 8 tokens: 2 + 3 + 3. Those that ended are left alone."""

    def respond(prompt: Prompt, rng: Any) -> list[int]:
        return [2] if rng.random() < 0.2 else [1] * 9

    run = Run(make_method("ead", warmup=2, piece=3), respond)
    groups = run.collect()
    lengths = [request.sampling.max_tokens for call in run.engine.calls for request in call if request.sampling]
    assert set(lengths) == {2, 3} and len(run.engine.calls) == 3
    responses = [rollout for group in groups for rollout in group.rollouts]
    assert max(len(one.response_ids) for one in responses) == 8
    assert all(len(one.response_ids) == len(one.behaviour_logp) and one.prompt.prefix == 0 for one in responses)
    assert all(one.response_ids.count(2) <= 1 for one in responses), "nothing goes on after the end"


def test_cure_branches_before_the_most_uncertain_token() -> None:
    """FakePolicy's entropy is a tenth of the id: of 1 5 1 2 the second. One original, three branches."""
    run = Run(make_method("cure", uncertain=1), lambda prompt, rng: [2] if prompt.prefix else [1, 5, 1, 2])
    groups = run.collect()
    first, second = run.engine.calls[:2]
    assert len(first) == 2 and len(second) == 6
    assert all(request.prompt.token_ids[2:] == (1,) and request.prompt.prefix == 1 for request in second)
    assert [group.rewards for group in groups] == [(0.0, 1.0, 1.0, 1.0)] * 2
    branch = run.minibatch(groups)[1]
    assert branch.prompt_ids[2:] == (1,) and branch.response_ids == (2,), "the prefix is not trained on"


# ---------------------------------------------------------------------------------------------- probabilities
def test_rlpr_by_hand() -> None:
    """FakePolicy: log p = -(id + 1) / 10. After the reasoning: ids 1 2, (e^-0.2 + e^-0.3) / 2; without: 7 7, e^-0.8.
    A response of two tokens has no answer: 0. First step: nothing is dropped, and the spread is remembered."""
    rng_free = iter(itertools.cycle(([1, 1, 1, 2], [1, 2])))
    run = Run(make_method("rlpr"), lambda prompt, rng: next(rng_free))
    groups = run.collect()
    reward = (math.exp(-0.2) + math.exp(-0.3)) / 2 - math.exp(-0.8)
    assert [group.rewards for group in groups] == [pytest.approx((reward, 0.0, reward, 0.0))] * 2
    spread = reward / math.sqrt(3)  # mean reward / 2, four deviations of it, n - 1 = 3
    assert run.collector.state_dict()["memory"] == {"spread": pytest.approx(spread)}
    run.collector._memory["spread"] = 2.1 * spread
    assert run.collect(1) == [], "below half of the mean spread"


# ---------------------------------------------------------------------------------------------- experts
def mixed_batch(method: Method) -> torch.Tensor:
    """Probabilities now 0.4, old 0.5, A = 1: an own token and an expert's; gradient in logp of both."""
    logp = torch.tensor([0.4, 0.4]).log().requires_grad_()
    batch = ChunkBatch(torch.tensor([0.5, 0.5]).log(), torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool),
                       external_C=torch.tensor([False, True]))  # fmt: skip
    value = method.terms(logp, batch).value_C
    value.sum().backward()
    assert logp.grad is not None
    return torch.stack([value.detach(), logp.grad])


def test_luffy_by_hand() -> None:
    """Own: r = 0.8, gradient 0.8. External: 0.4 / 0.5 = 0.8, gradient p c / (p + c)^2 = 0.04 / 0.25 = 0.16."""
    assert mixed_batch(make_method("luffy")).flatten().tolist() == pytest.approx([0.8, 0.8, 0.8, 0.16])


def test_rl_plus_by_hand() -> None:
    """External: 2 * 0.4 / (0.5 + 0.75) * sqrt(0.6) = 0.64 sqrt(0.6), linear in p: the gradient is the value."""
    expected = 0.64 * math.sqrt(0.6)
    assert mixed_batch(make_method("rl_plus")).flatten().tolist() == pytest.approx([0.8, expected, 0.8, expected])


def test_ampo_by_hand() -> None:
    """Own tokens as PPO with a dual clip: r = 20, A = -1 gives -10 without a gradient; external as LUFFY's."""
    assert mixed_batch(make_method("ampo")).flatten().tolist() == pytest.approx([0.8, 0.8, 0.8, 0.16])
    logp = torch.tensor([20.0]).log().requires_grad_()
    one = ChunkBatch(torch.zeros(1), torch.zeros(1), -torch.ones(1), torch.ones(1, dtype=torch.bool))
    value = make_method("ampo").terms(logp, one).value_C
    value.sum().backward()
    assert value.item() == -10.0 and logp.grad is not None and logp.grad.item() == 0.0


def test_an_expert_takes_one_siblings_place() -> None:
    """R = 0 0 0 and the expert's 1: A = -1/4, 3/4 over the longest response, 8."""
    run = Run(make_method("luffy"), wrong)
    groups = run.collect()
    assert [[one.origin for one in group.rollouts] for group in groups] == [["policy"] * 3 + ["expert"]] * 2
    samples = run.minibatch(groups)
    assert [sample.advantage for sample in samples[:4]] == [-0.03125] * 3 + [0.09375]
    assert samples[3].behaviour_logp == () and samples[3].origin == "expert"


def test_ampo_brings_teachers_only_where_all_fail_and_the_best_understood_ones() -> None:
    """Three solutions, one without the answer: that one is not among the two."""
    run = Run(make_method("ampo"), wrong, solutions=Solved(texts=("77", "12", "312")))
    groups = run.collect()
    experts = [[one.response_ids for one in group.rollouts if one.origin == "expert"] for group in groups]
    assert experts == [[(1, 2), (3, 1, 2)]] * 2 and [len(group.rollouts) for group in groups] == [4, 4]
    own = Run(make_method("ampo"), lambda prompt, rng: [1, 2])
    assert all(one.origin == "policy" for group in own.collect() for one in group.rollouts)


# ---------------------------------------------------------------------------------------------- segments
def logs(*probabilities: float) -> list[float]:
    return [math.log(one) for one in probabilities]


def test_spo_chain_by_hand() -> None:
    """A right response of four tokens, the second certain; two continuations from the tokens 0, 2 and 3: V = 1/2, 1, 0.
    Segments: 1 - 1/2 (two tokens), 0 - 1, 1 - 0; the certain token: 0. Mean of 0.5 0 -1 1: 1/8, variance 2.1875 / 3.
    A sibling whose tokens are certain adds two zeros: mean 1/12, variance (2.25 - 6 / 144) / 5. Three tokens of six are
    trained on, so that the sum over all of them, divided by six, is the mean over three."""
    spo = make_method("spo_chain", interval=1, continuations=2)
    steps = {"origin_N": ["policy", "policy", *["baseline"] * 6], "group_N": [0] * 8, "counts_N": [True] * 8}
    step = StepView(
        reward_N=[1.0, 0.0, *(1.0, 0.0), *(1.0, 1.0), *(0.0, 0.0)],
        length_N=[4, 2, 3, 3, 2, 2, 1, 1],
        behaviour_N=[logs(0.5, 0.95, 0.5, 0.5), logs(0.99, 0.99), *([[-0.1]] * 6)],
        **steps,
    )
    first, second, *others = spo.advantages(step)
    mean, scale = 0.5 / 6, 6 / 3 / math.sqrt((2.25 - 6 * (0.5 / 6) ** 2) / 5)
    expected = [(0.5 - mean) * scale, 0.0, (-1 - mean) * scale, (1 - mean) * scale]
    assert torch.as_tensor(first).tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.as_tensor(second).tolist() == [0.0, 0.0] and others == [0.0] * 6


def test_spo_chain_skips_a_cut_without_verdicts_and_what_is_before_the_first() -> None:
    """interval 2 of the uncertain tokens 1, 2, 3: cuts at 1 and 3. Nothing is known of the second one: one segment."""
    spo = make_method("spo_chain", interval=2, continuations=1)
    assert spo.cuts(logs(0.95, 0.5, 0.5, 0.5)) == [1, 3]
    step = StepView(
        reward_N=[1.0, 0.25, 0.0],
        counts_N=[True, True, False],
        group_N=[0, 0, 0],
        length_N=[4, 3, 1],
        origin_N=["policy", "baseline", "baseline"],
        behaviour_N=[logs(0.95, 0.5, 0.5, 0.5), [-0.1], [-0.1]],
    )
    assert spo.of_segments(step, [0, 1, 2]) == {0: [0.0, 0.75, 0.75, 0.75]}


def test_spo_chain_asks_from_its_cuts() -> None:
    """Cuts are where the engine's probability is below 0.9; the prompt's own value is asked for once per group."""
    run = Run(make_method("spo_chain", interval=2, continuations=3), lambda prompt, rng: [1, 1, 1, 2][prompt.prefix :])
    groups = run.collect()
    spo, (drawn, continued) = run.method, run.engine.calls
    own = [[one for one in group.rollouts if one.origin == "policy"] for group in groups]
    assert [len(one) for one in own] == [4, 4] and len(drawn) == 8
    for group, responses in zip(groups, own, strict=True):
        cuts = [cut for one in responses for cut in spo.cuts(one.behaviour_logp)]
        wanted = [0] * (0 in cuts) + [cut for cut in cuts if cut]
        asked = [one.prompt.prefix for one in group.rollouts if one.origin == "baseline"]
        assert asked == [cut for cut in wanted for _ in range(3)]
    assert len(continued) == sum(len(group.rollouts) for group in groups) - 8
    samples = run.minibatch(groups)
    assert [sample.masked for sample in samples] == [one.origin == "baseline" for g in groups for one in g.rollouts]
    trained = [sample for sample in samples if not sample.masked]
    assert all(torch.as_tensor(sample.advantage).shape == (4,) for sample in trained)
