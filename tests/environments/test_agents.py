"""Agents as environments, with the real packages `openai` and `verifiers`: what they ask and earn, how they fail.

Trained with a real engine: tests/e2e/test_agent_runs.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import pytest
from agents_site import add_agents, needs_agents

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments import EnvironmentPool, Problem, play
from owpo_megatron.environments.pool import Call, Reply
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.types import Prompt

pytestmark = [pytest.mark.extra, pytest.mark.process, needs_agents]
PROBLEM = Problem("sum/1", "1 + 1 =", "2", "math")
CALL = '<tool_call>{"name": "double", "arguments": {"x": 21}}</tool_call>'


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    add_agents(monkeypatch)


def settings(function: str, seconds: float = 100.0, **args: Any) -> EnvironmentConfig:
    args = {"function": f"agents:{function}", "seconds": seconds} | args
    return EnvironmentConfig(name="agent", args=args, timeout=200, workers=1)


def test_a_loop_is_an_environment() -> None:
    answers = play(settings("chat", args={"style": 0.5}), PROBLEM, ["a", "b", "c"])
    shown = [[(one.role, one.content) for one in answer.messages] for answer in answers]
    assert shown == [
        [("system", "echo"), ("user", "1 + 1 =")],
        [("user", "0: a")],
        [("user", "1: b")],
        [],
    ]
    assert answers[-1].done and answers[-1].rewards == {"reward": 1.0, "style": 0.5}


def test_a_stream_and_a_tool() -> None:
    opening, shown, end = play(settings("streaming"), Problem("d", "42?", "it is 42", "math"), [CALL, "it is 42"])
    assert opening.tools[0]["function"]["name"] == "double"
    assert [(one.role, one.content) for one in shown.messages] == [("tool", "42")]
    assert end.rewards == {"reward": 1.0}


def test_without_a_reward_the_rule_judges() -> None:
    assert play(settings("unjudged"), PROBLEM, ["2"])[-1].rewards == {}


@pytest.mark.parametrize(
    ("function", "seconds", "told"),
    [
        ("wandering", 100, "step 1 .*BadRequestError.*message 0 of the request is not that of the conversation"),
        ("silent", 100, "step 0 .*ended before it asked"),
        ("dying", 100, "step 1 .*the agent's process ended"),
        ("forking", 10, "step 1 .*the agent did nothing for 10 s"),
    ],
)
def test_an_agent_that_fails_costs_its_own_episode(function: str, seconds: float, told: str) -> None:
    with pytest.raises(RunError, match=told):
        play(settings(function, seconds), Problem("f", "?", "3141", "math"), ["x"])


def ask(pool: EnvironmentPool, episode: int, replies: Sequence[str]) -> Reply:
    return pool.ask(Call(episode, Prompt(f"p{episode}", (1,), "?", "3142", messages=(("user", "?"),)), tuple(replies)))


@pytest.fixture
def pool() -> Iterator[EnvironmentPool]:
    made = EnvironmentPool(settings("forking", 10))
    yield made
    made.close()


def sleepers() -> list[psutil.Process]:
    found = psutil.process_iter(["cmdline", "status"])
    return [one for one in found if one.info["cmdline"] == ["sleep", "3142"]]


def test_agents_live_side_by_side_with_their_processes_and_end_with_their_episodes(pool: EnvironmentPool) -> None:
    """Two episodes in one process; the first is let go of, the second's agent hangs."""
    for episode in (1, 2):
        assert ask(pool, episode, ()).answer is not None
    assert len(sleepers()) == 2, "a process that an agent started is its own business"
    pool.forget(1, Prompt("p1", (1,), "?", ""))
    late = ask(pool, 2, ("x",))
    assert late.answer is None and late.failure.startswith("crashed: TimeoutError: the agent did nothing")
    deadline = time.monotonic() + 20
    while sleepers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not sleepers()


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("agent", {"function": "agents:absent"}, "environment.args.function = agents:absent: make it importable"),
        ("agent", {"function": "os:getpid"}, r"an agent takes \(client, problem\)"),
        ("agent", {}, "environment.args = .*function"),
        ("verifiers", {"taskset": "no-such"}, "verifiers refuses it: taskset 'no-such' not found"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_starts(name: str, args: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        EnvironmentPool(EnvironmentConfig(name=name, args=args))


def test_a_taskset_of_the_package_verifiers(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own harness, in a process of its own, asks the policy; its rewards are the episode's."""
    from owpo_megatron.environments.verifiers import main

    assert main(["sums_taskset"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[4] == {"id": "sums_taskset/4", "problem": "1 + 1 =", "answer": "2"} and len(records) == 9
    limits = EnvironmentConfig(
        name="verifiers", args={"taskset": "sums_taskset", "seconds": 200}, timeout=300, memory_gb=8
    )
    opening, end = play(limits, Problem("sums_taskset/4", "1 + 1 =", "2", "math"), ["2"])
    assert [(one.role, one.content) for one in opening.messages] == [("user", "1 + 1 =")]
    assert end.done and end.rewards == {"reward": 1.5, "right": 1.0, "short": 0.5}
