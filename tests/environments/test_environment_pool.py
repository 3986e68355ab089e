"""Environments in their processes: episodes side by side, and what a step that hangs, crashes or floods costs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments import EnvironmentPool, Message, Problem
from owpo_megatron.environments.pool import Call, Reply
from owpo_megatron.environments.worker import MAX_CHARACTERS
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt

HERE = "python:test_environment_pool"
pytestmark = pytest.mark.process


class Counter:
    """Shows the replies so far, and does what a reply asks for."""

    def reset(self, problem: Problem) -> list[Message]:
        self.replies: list[str] = []
        return [Message("user", f"{problem.id}: {problem.text}")]

    def step(self, reply: str):  # type: ignore[no-untyped-def]
        self.replies.append(reply)
        if reply == "hang":
            time.sleep(600)
        if reply == "crash":
            os._exit(7)
        if reply == "raise":
            raise ValueError("as asked")
        if reply == "flood":
            return "x" * 50_000_000, False, None
        if reply == "wrong bytes":
            return b"\xff".decode("utf-8", "surrogateescape"), False, None
        if reply == "no tuple":
            return "text"
        if reply == "fill":
            return str(len(bytearray(2**40))), False, None
        if reply == "done":
            return "", True, {"reward": 1.0, "style": 0.5}
        return "+".join(self.replies), False, None


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    config = EnvironmentConfig(name=f"{HERE}:Counter", workers=2, timeout=2.0)
    pool = EnvironmentPool(config)
    yield pool
    pool.close()


def prompt(number: int) -> Prompt:
    return Prompt(f"p{number}", (1,), "a text", "", messages=(("user", "a text"),))


def play(pool: EnvironmentPool, episode: int, *replies: str) -> list[Reply]:
    """Replies of a whole episode, one step after the other."""
    return [pool.ask(Call(episode, prompt(episode), replies[:count])) for count in range(len(replies) + 1)]


def texts(replies: list[Reply]) -> list[str | None]:
    return [None if one.answer is None else "".join(m.content for m in one.answer.messages) for one in replies]


def test_episodes_keep_their_state_side_by_side(pool: EnvironmentPool) -> None:
    replies = {number: ("a", "b", f"c{number}") for number in range(6)}
    found = {
        (number, count): pool.ask(Call(number, prompt(number), replies[number][:count]))
        for count in range(4)
        for number in replies
    }
    for number in replies:
        own = [found[number, count] for count in range(4)]
        assert texts(own) == [f"p{number}: a text", "a", "a+b", f"a+b+c{number}"]
        assert [one.answer.calls for one in own] == [0, 1, 1, 1]
        pool.forget(number, prompt(number))


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        ("hang", "timeout: no verdict within"),
        ("crash", "crashed: its process exited with status 7"),
        ("raise", "crashed: ValueError: as asked"),
        ("no tuple", "crashed: TypeError: step returned 'text', not (observation, done, rewards)"),
        ("fill", "crashed: its process ran out of memory"),
    ],
)
def test_a_step_that_fails_costs_its_own_episode(pool: EnvironmentPool, reply: str, failure: str) -> None:
    """The neighbour at the same process loses its instance with it, and goes on where it was."""
    before = play(pool, 20, "a", "b")
    assert play(pool, 22, "x", reply)[-1].failure.startswith(failure)
    after = pool.ask(Call(20, prompt(20), ("a", "b", "c")))
    assert texts([*before, after]) == ["p20: a text", "a", "a+b", "a+b+c"]


def test_a_flood_is_cut_in_its_middle_and_wrong_bytes_are_marked(pool: EnvironmentPool) -> None:
    (flood,) = texts(play(pool, 30, "flood")[1:])
    assert flood is not None and MAX_CHARACTERS <= len(flood) < MAX_CHARACTERS + 100
    assert "(49940000 characters are left out)" in flood
    assert texts(play(pool, 31, "wrong bytes")[1:]) == ["?"]


def test_rewards_come_with_the_end(pool: EnvironmentPool) -> None:
    answer = play(pool, 40, "done")[-1].answer
    assert answer is not None and answer.done and answer.rewards == {"reward": 1.0, "style": 0.5} and not answer.calls


class Stateless:
    def __init__(self, size: int):
        self.size = size

    def reset(self, problem: Problem) -> list[Message]:
        return list(problem.messages)


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        (f"{HERE}:Absent", {}, "environment.name = .*Absent: make it importable"),
        (f"{HERE}:Stateless", {"size": 1}, "it has no step"),
        (f"{HERE}:Stateless", {"width": 1}, "environment.args = .*width"),
        ("search", {"documents": "no/such.jsonl"}, "environment.args.documents"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_starts(name: str, args: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        EnvironmentPool(EnvironmentConfig(name=name, args=args))


def test_an_unknown_name_is_refused_by_the_configuration() -> None:
    with pytest.raises(
        ValueError, match="use one of agent, calculator, lookup, python, search, verifiers, python:MODULE"
    ):
        EnvironmentConfig(name="abacus")


assert Path(__file__).stem == HERE.removeprefix("python:")
