"""Sessions of agents, recorded: spans and seeds, limits, refusals, and what a replay makes of them. The engine is
scripted; the real one, with the official client: tests/e2e/test_agent_runs.py."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.data.small_tokenizers import make_character_tokenizer
from owpo_megatron.data.tasks import get_task
from owpo_megatron.engine import RecordedEngine, load_rollouts, rollouts_path, save_rollouts
from owpo_megatron.environments.chat import ChatError
from owpo_megatron.environments.episode import turn_seed
from owpo_megatron.environments.sessions import NO_SEED, SessionRecorder
from owpo_megatron.environments.turns import TurnTemplate
from owpo_megatron.errors import EngineError
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling, Span
from owpo_megatron.types.rollouts import Judgement

TOKENIZER = Tokenizer(make_character_tokenizer(get_task("lookup").alphabet))
EOS = TOKENIZER.eos_ids[0]
CHAT, END = "/v1/chat/completions", "/v1/sessions/end"


class Drawn:
    """Replies `k?` and then `12`, and keeps what it was asked."""

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []

    def __call__(self, request: SampleRequest, sampling: Sampling) -> Rollout:
        self.requests.append(request)
        asks = "?" not in TOKENIZER.decode(request.prompt.token_ids)
        ids = (*TOKENIZER.encode("k?" if asks else "12"), EOS)[: sampling.max_tokens]
        logps = [-random.Random(request.seed + place).random() for place in range(len(ids))]
        return Rollout(request.prompt, ids, logps, 0, "stop" if ids[-1] == EOS else "length", request.seed)


class Failing:
    def append(self, request: SampleRequest) -> None:
        raise ChatError(503, "the engine failed")


def recorder(folder: Path, max_tokens: int = 32, **limits: Any) -> tuple[SessionRecorder, Drawn]:
    config = EnvironmentConfig(name="agent", **limits)
    turns = TurnTemplate(PromptTemplate("raw", TOKENIZER), config, 16)
    drawn = Drawn()
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)

    def save(number: int, rollouts: Any) -> None:
        save_rollouts(rollouts_path(folder / "rollouts", number), rollouts)

    sampling = Sampling(max_tokens, stop_token_ids=(EOS,))
    return SessionRecorder(drawn, save, folder, turns, config, sampling, TOKENIZER.decode), drawn


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


def play(made: SessionRecorder, name: str, reward: Any = 1.0) -> dict[str, Any]:
    messages = [{"role": "user", "content": "k+w="}]
    for shown in ("7", None):
        found = made.answer(CHAT, key(name), {"messages": messages, "temperature": 0.2})
        messages.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
        if shown:
            messages.append({"role": "user", "content": shown})
    return dict(made.answer(END, key(name), {"reward": reward}))


def test_a_session_is_an_episode_token_by_token(tmp_path: Path) -> None:
    made, drawn = recorder(tmp_path)
    assert play(made, "p/1#0", {"reward": 0.5, "style": 0.25}) == {"session": "p/1#0", "turns": 2, "tokens": 6}
    (rollout,) = load_rollouts(rollouts_path(tmp_path / "rollouts", 1))
    first, second = drawn.requests
    assert rollout.prompt.id == "p/1" and rollout.prompt.token_ids == TOKENIZER.encode("k+w=")
    assert rollout.response_ids == (*TOKENIZER.encode("k?"), EOS, *TOKENIZER.encode("7"), *TOKENIZER.encode("12"), EOS)
    assert rollout.episode is not None
    assert rollout.episode.spans == (
        Span(3, policy_version=0),
        Span(1, False, calls=0),
        Span(3, policy_version=0, reward=0.5),
    )
    assert rollout.episode.judgement == Judgement("wrong", 0.5, {"style": 0.25})
    assert second.seed == turn_seed(first.seed, 1) and first.session == second.session
    assert second.prompt.token_ids == (*rollout.prompt.token_ids, *rollout.response_ids[:4])
    logps = [-random.Random(seed + place).random() for seed in (first.seed, second.seed) for place in range(3)]
    assert list(rollout.behaviour_logp) == pytest.approx([*logps[:3], 0.0, *logps[3:]], abs=1e-7)
    (problem,) = map(json.loads, (tmp_path / "problems.jsonl").read_text().splitlines())
    assert problem["id"] == "p/1" and problem["messages"] == [{"role": "user", "content": "k+w="}]


def test_a_replay_gives_a_problems_sessions_to_its_siblings_in_order(tmp_path: Path) -> None:
    made, _ = recorder(tmp_path)
    for name, reward in (("a#0", 1), ("b#0", 0), ("a#1", 0), ("b#x", 1)):
        play(made, name, reward)
    engine = RecordedEngine(tmp_path / "rollouts")
    requests = [SampleRequest(Prompt(name, (1,), "", ""), seed) for seed, name in enumerate("abab")]
    rollouts = engine.generate(requests, Sampling(8))
    assert [(one.prompt.id, one.judgement.score) for one in rollouts] == [("a", 1), ("b", 0), ("a", 0), ("b", 1)]
    assert all(one.seed == NO_SEED for one in rollouts)
    with pytest.raises(EngineError, match="2 sessions of problem a.*rollout.group_size to at most 2"):
        engine.generate([*requests, requests[0]], Sampling(8))
    again, _ = recorder(tmp_path)
    play(again, "a#2")
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == 2, "a problem is a line"


@pytest.mark.parametrize(("limits", "told"), [({"max_turns": 1}, "turns"), ({"max_tokens": 6}, "tokens")])
def test_at_a_limit_a_session_ends_and_may_still_be_rewarded(tmp_path: Path, limits: dict, told: str) -> None:
    made, _ = recorder(tmp_path, **limits)
    messages = [{"role": "user", "content": "k+w="}]
    made.answer(CHAT, key("p"), {"messages": messages})
    messages += [{"role": "assistant", "content": "k?"}, {"role": "user", "content": "777"}]
    for _ in range(2):
        with pytest.raises(ChatError, match=f"session p has ended: its limit of {told} is reached"):
            made.answer(CHAT, key("p"), {"messages": messages})
    assert made.answer(END, key("p"), {"reward": 0})["turns"] == 1
    (rollout,) = load_rollouts(rollouts_path(tmp_path / "rollouts", 1))
    assert rollout.finish_reason == "length" and rollout.episode is not None and rollout.episode.ended == told


def test_an_engine_that_fails_ends_the_session(tmp_path: Path) -> None:
    made, drawn = recorder(tmp_path)
    messages = [{"role": "user", "content": "k+w="}]
    made.answer(CHAT, key("p"), {"messages": messages})
    messages += [{"role": "assistant", "content": "k?"}, {"role": "user", "content": "7"}]

    drawn.requests = Failing()  # type: ignore[assignment]
    with pytest.raises(ChatError, match="the engine failed") as refused:
        made.answer(CHAT, key("p"), {"messages": messages})
    assert refused.value.status == 503
    with pytest.raises(ChatError, match="session p has ended: crashed: the engine failed"):
        made.answer(CHAT, key("p"), {"messages": messages})
    made.answer(END, key("p"), {"reward": 1})
    (rollout,) = load_rollouts(rollouts_path(tmp_path / "rollouts", 1))
    assert rollout.judgement is not None and rollout.judgement.reason == "crashed", "out of the loss"


@pytest.mark.parametrize(
    ("path", "headers", "body", "status", "told"),
    [
        (CHAT, {}, {"messages": [{"role": "user", "content": "k"}]}, 401, "name the session"),
        (END, key("absent"), {"reward": 1}, 404, "no session 'absent'"),
        (END, key("p"), {"reward": "much"}, 400, "reward"),
        (END, key("p"), {"reward": {"style": 1}}, 400, 'one is "reward"'),
        (END, key("p"), {"reward": float("nan")}, 400, "reward"),
        ("/v1/embeddings", key("p"), {}, 404, "not served here"),
        (CHAT, key("p"), {"messages": [{"role": "user", "content": "?" * 40}]}, 400, "longest|max_prompt_tokens"),
    ],
)
def test_refusals(tmp_path: Path, path: str, headers: dict, body: Any, status: int, told: str) -> None:
    made, drawn = recorder(tmp_path)
    with pytest.raises(ChatError, match=told) as refused:
        made.answer(path, headers, body)
    assert refused.value.status == status and not drawn.requests
    assert not list((tmp_path / "rollouts").iterdir())
