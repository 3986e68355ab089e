"""Episodes over a scripted engine, with real environments in their processes: tokens, spans, seeds, limits, failures.

Turns through a real server: tests/e2e/test_episode_runs.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from scripted import ScriptedEngine

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.data.small_tokenizers import make_character_tokenizer
from owpo_megatron.data.tasks import get_task
from owpo_megatron.data.tasks.lookup import table_of
from owpo_megatron.environments import EnvironmentPool, EpisodeEngine, TurnTemplate
from owpo_megatron.environments.episode import turn_seed
from owpo_megatron.errors import UserError
from owpo_megatron.run.rollouts import parse_rollout, plain_rollout
from owpo_megatron.types import GradingItem, Prompt, SampleRequest, Sampling, Span
from owpo_megatron.types.rollouts import Judgement
from owpo_megatron.verifiers import KnownVerdicts
from owpo_megatron.verifiers.build import DirectVerifier
from owpo_megatron.verifiers.generated_tasks import grade_cipher

pytestmark = pytest.mark.process
TASK = get_task("lookup")
TOKENIZER = Tokenizer(make_character_tokenizer(TASK.alphabet + "xyz!"[3:]))
EOS = TOKENIZER.eos_ids[0]
TEMPLATE = PromptTemplate("raw", TOKENIZER)
PROBLEMS = TASK.problems("train")[:6]


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[..., EnvironmentPool]]:
    made: dict[str, EnvironmentPool] = {}

    def of(name: str, **more: Any) -> EnvironmentPool:
        if name not in made:
            made[name] = EnvironmentPool(EnvironmentConfig(name=name, timeout=2.0, **more))
        return made[name]

    yield of
    for pool in made.values():
        pool.close()


def solver(request: SampleRequest, rng: random.Random) -> list[int]:
    """Looks both keys up and adds, whatever the seed; reads the entries where the environment wrote them."""
    text = TOKENIZER.decode_all(request.prompt.token_ids).replace("<eos>", "")
    (first, second), told = text[:3:2], text[4:]
    entries = [part[0] for part in told.split("?")[1:]]
    reply = (f"{first}?", f"{second}?")[len(entries)] if len(entries) < 2 else str(sum(map(int, entries)))
    return [*TOKENIZER.encode(reply), EOS]


def episodes(
    engine: ScriptedEngine,
    pool: EnvironmentPool,
    requests: Sequence[SampleRequest],
    max_tokens: int = 16,
    **limits: Any,
) -> tuple[EpisodeEngine, list[Any]]:
    config = EnvironmentConfig(**({"name": "lookup"} | limits))
    turns = TurnTemplate(TEMPLATE, config, 8)
    made = EpisodeEngine(engine, pool, turns, config, TOKENIZER.decode)
    return made, made.generate(requests, Sampling(max_tokens, stop_token_ids=(EOS,)))


def requests_for(prompts: Sequence[Prompt], siblings: int = 2) -> list[SampleRequest]:
    return [SampleRequest(one, 1000 + 7 * place) for place, one in enumerate(prompts) for _ in range(siblings)]


def test_spans_seeds_and_rewards_of_whole_episodes(pools: Callable[..., EnvironmentPool]) -> None:
    engine = ScriptedEngine(solver, EOS)
    prompts = [TEMPLATE.prompt(problem) for problem in PROBLEMS]
    requests = requests_for(prompts)
    made, rollouts = episodes(engine, pools("lookup"), requests)
    for request, rollout, problem in zip(requests, rollouts, [p for p in PROBLEMS for _ in (0, 1)], strict=True):
        (first, second), table = problem.text[:3:2], table_of(problem.id)
        turns = [f"{first}?", str(table[first]), f"{second}?", str(table[second]), problem.answer]
        ids = [
            token
            for place, text in enumerate(turns)
            for token in (*TOKENIZER.encode(text), *([] if place % 2 else [EOS]))
        ]
        assert rollout.response_ids == tuple(ids) and rollout.prompt == request.prompt
        last = len(problem.answer) + 1
        assert rollout.episode.spans == (
            Span(3, policy_version=3),
            Span(1, False, calls=1),
            Span(3, policy_version=3),
            Span(1, False, calls=1),
            Span(last, policy_version=3, reward=1.0),
        )
        assert rollout.loss_mask == (True, True, True, False) * 2 + (True,) * last
        assert rollout.generated_length == 6 + last and TOKENIZER.decode(rollout.answer_ids) == problem.answer
        seeds = [turn_seed(request.seed, turn) for turn in range(3)]
        assert seeds[0] == request.seed == rollout.seed and len(set(seeds)) == 3
        expected = [-(seed % 97) - p / 128 for seed, n in zip(seeds, (3, 3, last), strict=True) for p in range(n)]
        assert [logp for logp, own in zip(rollout.behaviour_logp, rollout.loss_mask, strict=True) if own] == expected
        assert rollout.episode.judgement == Judgement("ok", 1.0) and rollout.finish_reason == "stop"
        assert parse_rollout(plain_rollout(rollout)) == rollout
    contexts = {one.prompt.token_ids: one.seed for one in engine.requests}
    assert all(contexts[(*r.prompt.token_ids, *r.response_ids[:4])] == turn_seed(r.seed, 1) for r in rollouts), (
        "a turn's context is what the engine wrote, and the observation"
    )
    assert made.taken()["tool_seconds"] > 0 and made.taken() == {"tool_seconds": 0.0}


def test_siblings_with_the_same_seed_are_equal_in_any_order(pools: Callable[..., EnvironmentPool]) -> None:
    prompts = [TEMPLATE.prompt(problem) for problem in PROBLEMS]
    _, together = episodes(ScriptedEngine(noisy, EOS), pools("lookup"), requests_for(prompts))
    for request, one in zip(requests_for(prompts), together, strict=True):
        _, (alone,) = episodes(ScriptedEngine(noisy, EOS), pools("lookup"), [request])
        assert alone == one


def noisy(request: SampleRequest, rng: random.Random) -> list[int]:
    return [*TOKENIZER.encode(rng.choice(["a?", "b?", "0?", "7", "12"])), EOS]


def talk(request: SampleRequest, rng: random.Random) -> list[int]:
    return [*TOKENIZER.encode("a"), EOS]


@pytest.mark.parametrize(
    ("limits", "max_tokens", "ended", "turns"),
    [
        ({"max_turns": 3}, 64, "turns", 3),
        ({}, 8, "tokens", 3),  # turns of two and observations of one: the third turn ends at 8, nothing follows it
        ({"max_turn_tokens": 1}, 64, "tokens", 1),  # cut off before its end
        ({"max_seconds": 1e-6}, 64, "seconds", 1),
    ],
)
def test_limits(pools: Callable[..., EnvironmentPool], limits: dict, max_tokens: int, ended: str, turns: int) -> None:
    pool = pools("python:talker:Talker")
    requests = requests_for([TEMPLATE.prompt(PROBLEMS[0])], siblings=1)
    _, (rollout,) = episodes(ScriptedEngine(talk, EOS), pool, requests, max_tokens, **limits)
    assert (rollout.episode.ended, len(rollout.episode.turns)) == (ended, turns)
    assert rollout.finish_reason == "length" and rollout.episode.spans[-1].generated
    assert len(rollout.response_ids) <= max_tokens
    if turns == 3:
        assert rollout.episode.judgement == Judgement("wrong", 0.5, {"talk": 2.0})
        assert [span.reward for span in rollout.episode.turns] == [0.0, 0.25, 0.25]
    else:
        assert rollout.episode.judgement is None, "the verifier's rule judges it"


def test_an_environment_that_hangs_costs_its_own_episode(pools: Callable[..., EnvironmentPool]) -> None:
    def respond(request: SampleRequest, rng: random.Random) -> list[int]:
        return [*TOKENIZER.encode("w" if request.prompt.id == PROBLEMS[1].id else "a"), EOS]

    pool = pools("python:talker:Talker")
    prompts = [TEMPLATE.prompt(problem) for problem in PROBLEMS]
    _, rollouts = episodes(ScriptedEngine(respond, EOS), pool, requests_for(prompts, 1), 8)
    assert [one.episode.ended for one in rollouts] == ["tokens", "failed", *["tokens"] * 4]
    failed = rollouts[1].episode
    assert failed.judgement is not None and failed.judgement.reason == "timeout"
    assert all(one.response_ids == rollouts[0].response_ids for one in (*rollouts[2:], rollouts[0]))
    verifier = KnownVerdicts(DirectVerifier({"lookup": grade_cipher}))
    items = [GradingItem("13", "13", "lookup"), GradingItem.of(rollouts[1], TOKENIZER.decode)]
    verdicts = verifier.score(items)
    assert [verdict.reason for verdict in verdicts] == ["ok", "timeout"] and "no verdict" in verdicts[1].detail


def test_a_plan_that_begins_responses_is_refused(pools: Callable[..., EnvironmentPool]) -> None:
    begun = TEMPLATE.prompt(PROBLEMS[0]).begun((5,))
    with pytest.raises(UserError, match="use another rollout.plan"):
        episodes(ScriptedEngine(talk, EOS), pools("lookup"), [SampleRequest(begun, 1)])
