"""One episode under way: its tokens, its spans, its limits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments.pool import Reply
from owpo_megatron.environments.protocol import REWARD
from owpo_megatron.environments.turns import TurnTemplate
from owpo_megatron.errors import UserError
from owpo_megatron.types import (
    Ended,
    Episode,
    FinishReason,
    Prompt,
    Rollout,
    SampleRequest,
    Sampling,
    Span,
    TokenIds,
    TokenValues,
)
from owpo_megatron.types.rollouts import Judgement, VerdictReason


def turn_seed(seed: int, turn: int) -> int:
    """31 bits for each turn of a sample; the first turn's are the sample's own."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/turn/{turn}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class RunningEpisode:
    """A sample that has turns. It holds the engine's ids and log-probs as they came, and never renders them again.

    Args:
        number: among the episodes of the run's process; the engine's session.
        request: the sample's.
        sampling: the sample's; max_tokens is shared by its turns and observations.
    """

    number: int
    request: SampleRequest
    sampling: Sampling
    limits: EnvironmentConfig
    turns: TurnTemplate
    decode: Callable[[Sequence[int]], str]
    ended: Ended | None = None
    tool_seconds: float = 0.0
    replies: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt: Prompt = self.request.prompt
        self._ids: list[int] = []
        self._logps: list[float] = []
        self._spans: list[Span] = []
        self._parts: dict[str, float] = {}
        self._finish: FinishReason = "stop"
        self._version = -1
        self.failure = ""  # of its environment
        self._since = time.monotonic()

    def next_turn(self) -> SampleRequest:
        """The request for the turn that is due."""
        left = self.sampling.max_tokens - len(self._ids)
        sampling = replace(self.sampling, max_tokens=min(left, self.limits.max_turn_tokens or left))
        context = replace(self.prompt, token_ids=(*self.prompt.token_ids, *self._ids))
        return SampleRequest(context, turn_seed(self.request.seed, len(self.replies)), sampling, self.number)

    def hear(self, rollout: Rollout) -> None:
        """Take over a turn from the engine. One that was cut off ends the episode: no environment is asked about it."""
        self._ids += rollout.response_ids
        self._logps += rollout.behaviour_logp
        self._version = rollout.policy_version
        self._spans.append(Span(len(rollout.response_ids), policy_version=rollout.policy_version))
        self.replies.append(self.decode(rollout.response_ids))
        if rollout.finish_reason == "length":
            self._end("tokens", "length")

    def observe(self, reply: Reply) -> None:
        """Take over what the environment answered to the reset or to the last turn."""
        self.tool_seconds += reply.seconds
        answer = reply.answer
        if answer is None:
            self.fail(reply.failure)
            return
        try:
            if not self.replies:
                self.prompt = self.turns.opening(answer.messages, self.request.prompt, answer.tools)
                return
            self.reward(answer.rewards)
            if answer.done:
                self._end("done", "stop")
            else:
                ids = self.turns.between(answer.messages, self._ids[-1])
                self._show(ids, answer.calls, answer.errors)
        except UserError as error:  # a text that this template or tokenizer does not take
            self.fail(f"crashed: {error}")

    def fail(self, failure: str) -> None:
        """End an episode whose environment failed."""
        self.failure = failure
        self._end("failed", "stop")

    def reward(self, rewards: Mapping[str, float]) -> None:
        """Add the parts that the environment gave for the last turn."""
        for name, value in rewards.items():
            self._parts[name] = self._parts.get(name, 0.0) + value
        if REWARD in rewards:
            self._spans[-1] = replace(self._spans[-1], reward=rewards[REWARD])

    def rollout(self) -> Rollout:
        assert self.ended is not None
        return Rollout(
            self.prompt,
            TokenIds(self._ids),
            TokenValues(self._logps),
            self._version,
            self._finish,
            self.request.seed,
            episode=Episode(tuple(self._spans), self.ended, self._judgement(), self.failure),
        )

    def _show(self, ids: Sequence[int], calls: int, errors: int) -> None:
        """Append an observation, unless no turn can follow it: nothing is trained behind the last turn."""
        seconds = self.limits.max_seconds
        if len(self.replies) == self.limits.max_turns:
            self._end("turns", "length")
        elif len(self._ids) + len(ids) >= self.sampling.max_tokens:
            self._end("tokens", "length")
        elif seconds is not None and time.monotonic() - self._since > seconds:
            self._end("seconds", "length")
        else:
            self._ids += ids
            self._logps += [0.0] * len(ids)
            self._spans.append(Span(len(ids), generated=False, calls=calls, errors=errors))

    def _end(self, why: Ended, finish: FinishReason) -> None:
        self.ended, self._finish = why, finish

    def _judgement(self) -> Judgement | None:
        if self.ended == "failed":
            reason: VerdictReason = "timeout" if self.failure.startswith("timeout") else "crashed"
            return Judgement(reason, detail=self.failure)
        if REWARD not in self._parts:
            return None
        score = self._parts[REWARD]
        others = {name: value for name, value in self._parts.items() if name != REWARD}
        return Judgement("ok" if score >= 1 else "wrong", score, others or None)
