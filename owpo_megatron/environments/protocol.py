"""The one protocol of environments, and what they give and take.

    messages = environment.reset(problem)                      begins the conversation
    observation, done, rewards = environment.step(reply)       after each turn of the policy

Synchronous Python, one instance per episode, in a process that can be killed. An instance is a function of its problem
and the replies so far: where its process was killed for another episode's sake, it is made anew and goes through the
replies again. Anything random comes from the problem (`random.Random(problem.id)`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from owpo_megatron.data.problem import Message, Problem

REWARD = "reward"
"""Name of the part that is the environment's verdict: summed over the turns, right from 1 on."""


@dataclass(frozen=True)
class Observation:
    """A text that the policy is shown next, and counts for the metrics.

    Example:
        Observation("42"), Observation("no such key", errors=1)
    """

    text: str
    calls: int = 1  # tool calls that it answers
    errors: int = 0  # of these: failed


@dataclass(frozen=True)
class Opening:
    """Messages that begin a conversation, with the tools that the chat template describes to the policy."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()  # as the chat protocol has them


Shown = str | Observation | Sequence[Message]
"""A text in `environment.role` (one tool call, unless it is empty), the same with counts, or messages."""
Rewards = float | Mapping[str, float] | None
"""A number is the part `reward`. No such part in any turn: the verifier's rule judges the last turn."""


class Environment(Protocol):
    """The other side of one episode. It may hang, crash or fill its memory: its own episode ends.

    Two things are optional: a method `close`, called where the episode ends before the environment has ended it; and
    `own_process = True` of a class whose instances live in processes of their own. Such an instance may leave processes
    running between steps, and is not made anew: what it did cannot be gone through again.
    """

    def reset(self, problem: Problem) -> Sequence[Message] | Opening:
        """The messages that begin the conversation; the policy writes next."""

    def step(self, reply: str) -> tuple[Shown, bool, Rewards]:
        """(what the policy is shown next, whether the episode is over, rewards of this turn)."""


@dataclass(frozen=True)
class Answer:
    """Result of a reset or a step, as it leaves the environment's process."""

    messages: tuple[Message, ...] = ()
    done: bool = False
    rewards: Mapping[str, float] = field(default_factory=dict)
    calls: int = 0
    errors: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()  # of an opening

    @classmethod
    def of_reset(cls, result: Any) -> Answer:
        """Raises TypeError where `reset` returned something else than messages."""
        opening = result if isinstance(result, Opening) else Opening(result)
        return cls(_messages(opening.messages, "reset"), tools=tuple(opening.tools))

    @classmethod
    def of_step(cls, result: Any, role: str) -> Answer:
        """Raises TypeError where `step` returned something else than the protocol has."""
        if not isinstance(result, tuple) or len(result) != 3:
            raise TypeError(f"step returned {result!r:.100}, not (observation, done, rewards)")
        shown, done, rewards = result
        if isinstance(shown, str):
            shown = Observation(shown, calls=int(bool(shown)))
        if isinstance(shown, Observation):
            messages = _messages([Message(role, shown.text)] if shown.text else [], "step")
            calls, errors = shown.calls, shown.errors
        else:
            messages = _messages(shown, "step")
            calls, errors = len(messages), 0
        if not messages and not done:
            raise TypeError("step returned no observation and is not done: the policy has nothing to answer")
        return cls(messages, bool(done), _parts(rewards), calls, errors)


def _messages(value: Any, who: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{who} returned {value!r:.100}, not messages")
    found = tuple(one if isinstance(one, Message) else _message(one, who) for one in value)
    if not found and who == "reset":
        raise TypeError("reset returned no message")
    return found


def _message(value: Any, who: str) -> Message:
    """A message as the chat protocol writes it."""
    if isinstance(value, Mapping) and isinstance(value.get("content"), str) and isinstance(value.get("role"), str):
        return Message(value["role"], value["content"])
    raise TypeError(f"{who} returned the message {value!r:.100}; give Message(role, content)")


def _parts(rewards: Any) -> dict[str, float]:
    parts = {} if rewards is None else rewards if isinstance(rewards, Mapping) else {REWARD: rewards}
    found = {str(name): float(value) for name, value in parts.items()}
    if not all(map(math.isfinite, found.values())):
        raise TypeError(f"step returned the rewards {rewards!r:.100}; give finite numbers")
    return found
