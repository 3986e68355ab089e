"""Side of the environments' process: the instances that it holds, and one order at a time for one of them.

It is a rule of the verifier's pool, whose guard kills the process with all that a step started when the step's time is
over. What an instance returns is bounded here, since the pool takes short replies only.
"""

from __future__ import annotations

import json
from typing import Any

from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.environments.catalogue import EnvironmentMaker
from owpo_megatron.environments.protocol import Answer, Environment
from owpo_megatron.types import GradingItem
from owpo_megatron.types.rollouts import Judgement

MAX_CHARACTERS = 60_000  # of an answer's messages together; six bytes of JSON each at most
CUT = "\n... ({} characters are left out) ...\n"


class EnvironmentRule:
    """Runs the environments of a process; its replies are JSON in a judgement's detail.

    Args:
        make: an instance for each episode.
        role: of observations that are plain texts.
    """

    def __init__(self, make: EnvironmentMaker, role: str):
        self._make, self._role = make, role
        self._open: dict[int, tuple[int, Environment]] = {}  # by episode: (steps so far, instance)

    def warm(self) -> None:
        self._make.warm()

    def __call__(self, item: GradingItem) -> Judgement:
        order = json.loads(item.response)
        episode, position = order["episode"], order["position"]
        if position is None:
            self._drop(episode)
            return Judgement("ok")
        if position == 0:
            self._drop(episode)
            environment = self._make()
            answer = Answer.of_reset(environment.reset(_problem(order["problem"])))
        else:
            # Taken out first: an instance whose step raises or is killed is in an unknown state.
            steps, environment = self._open.pop(episode, (-1, None))  # type: ignore[assignment]
            if steps != position - 1:
                return Judgement("ok", detail=json.dumps({"known": False}))
            answer = Answer.of_step(environment.step(order["reply"]), self._role)
        if not answer.done:
            self._open[episode] = (position, environment)
        return Judgement("ok", detail=json.dumps({"known": True} | plain(answer)))

    def _drop(self, episode: int) -> None:
        _, environment = self._open.pop(episode, (0, None))
        if environment is not None and hasattr(environment, "close"):
            environment.close()


def plain(answer: Answer) -> dict[str, Any]:
    """An answer as JSON has it, its texts bounded and free of what no tokenizer takes."""
    room = MAX_CHARACTERS // max(1, len(answer.messages))
    return {
        "messages": [[one.role, shortened(_encodable(one.content), room)] for one in answer.messages],
        "done": answer.done,
        "rewards": dict(answer.rewards),
        "calls": answer.calls,
        "errors": answer.errors,
        "tools": list(answer.tools),
    }


def parse(found: dict[str, Any]) -> Answer:
    """The inverse of `plain`."""
    messages = tuple(Message(role, content) for role, content in found["messages"])
    return Answer(messages, found["done"], found["rewards"], found["calls"], found["errors"], tuple(found["tools"]))


def shortened(text: str, most: int) -> str:
    """The text without its middle, where it is longer.

    Example:
        >>> shortened("a" * 50 + "b" * 50, 20)
        'aaaaaaaaaa\\n... (80 characters are left out) ...\\nbbbbbbbbbb'
    """
    if len(text) <= most:
        return text
    half = most // 2
    return text[:half] + CUT.format(len(text) - 2 * half) + text[len(text) - half :]


def _encodable(text: str) -> str:
    """Lone surrogates, as a wrong decoding leaves them, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _problem(found: dict[str, Any]) -> Problem:
    messages = tuple(Message(role, content) for role, content in found["messages"])
    text = "\n\n".join(one.content for one in messages)
    return Problem(found["id"], text, found["answer"], found["domain"], messages)
