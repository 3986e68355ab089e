"""Sessions of agents that nobody here starts: they ask an endpoint, and their tokens and log-probs are kept.

    POST /v1/chat/completions   the OpenAI chat protocol; the API key, or the header X-Session, names the session
    POST /v1/sessions/end       {"reward": 1.0} or {"reward": {"reward": 1.0, "style": 0.5}}: the session is over

A session is an episode, and its name is PROBLEM#ANYTHING: sessions of one problem are siblings. One that has ended is a
file that `rollout.replay` reads, and its problem a line of problems.jsonl.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments.chat import ChatError, ChatRequest, Conversation, completion
from owpo_megatron.environments.episode import RunningEpisode
from owpo_megatron.environments.pool import Reply
from owpo_megatron.environments.protocol import REWARD, Answer
from owpo_megatron.environments.turns import TurnTemplate
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling

NO_SEED = -1  # of a rollout that no run drew
PROBLEMS, ROLLOUTS = "problems.jsonl", "rollouts"
RECORDED = "(its session's reward)"  # data wants an answer
DOMAIN = "math"  # any that has a rule; the sessions' rewards are given

Draw = Callable[[SampleRequest, Sampling], Rollout]
Save = Callable[[int, Sequence[Rollout]], None]
"""(number of the file from 1, rollouts)"""


class SessionRecorder:
    """Answers agents with the engine's replies, and keeps what it drew. Safe to use from any thread.

    Args:
        draw: one reply of the engine; ends its session with a ChatError.
        save: keeps a session that has ended.
        folder: gets problems.jsonl.
        sampling: parameters of every reply; max_tokens is a session's, as in a run. What requests ask for is left
            aside, since log-probs are trained on at the run's temperature.
        recorded: sessions that are in the folder already.
    """

    def __init__(
        self,
        draw: Draw,
        save: Save,
        folder: Path,
        turns: TurnTemplate,
        limits: EnvironmentConfig,
        sampling: Sampling,
        decode: Callable[[Sequence[int]], str],
        recorded: int = 0,
    ):
        self._draw, self._save, self._folder = draw, save, folder
        self._turns, self._limits, self._sampling, self._decode = turns, limits, sampling, decode
        self._lock = threading.Lock()  # of what follows
        self._open: dict[str, _Session] = {}
        self._count, self._recorded = 0, recorded
        problems = folder / PROBLEMS
        lines = problems.read_text(encoding="utf-8").splitlines() if problems.is_file() else []
        self._known = {json.loads(line)["id"] for line in lines}

    def answer(self, path: str, headers: Mapping[str, str], body: Any) -> Mapping[str, Any]:
        """The endpoint's answer to a POST.

        Raises:
            ChatError: the request cannot be answered; its session goes on.
        """
        name = headers.get("x-session") or headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not name:
            raise ChatError(401, "name the session, PROBLEM#ANYTHING, by the API key or the header X-Session")
        path = path.partition("?")[0]
        if path.endswith("/chat/completions"):
            return self._session(name).ask(body)
        if path.endswith("/sessions/end"):
            return self._end(name, body)
        raise ChatError(404, f"{path} is not served here; use /v1/chat/completions and /v1/sessions/end")

    def _session(self, name: str) -> _Session:
        with self._lock:
            if name not in self._open:
                self._count += 1
                prompt = Prompt(name.rpartition("#")[0] or name, (), "", RECORDED, DOMAIN)
                request = SampleRequest(prompt, _seed(name))
                arguments = (self._count, request, self._sampling, self._limits, self._turns, self._decode)
                self._open[name] = _Session(name, RunningEpisode(*arguments), self._draw)
            return self._open[name]

    def _end(self, name: str, body: Any) -> Mapping[str, Any]:
        rewards = _rewards(body)
        with self._lock:
            session = self._open.pop(name, None)
        if session is None:
            raise ChatError(404, f"there is no session {name!r:.80}; it may have ended")
        rollout = session.ended(rewards)
        with self._lock:
            self._recorded += 1
            self._save(self._recorded, [rollout])
            if rollout.prompt.id not in self._known:
                self._known.add(rollout.prompt.id)
                messages = [{"role": role, "content": content} for role, content in rollout.prompt.messages]
                record = {"id": rollout.prompt.id, "messages": messages, "answer": RECORDED, "domain": DOMAIN}
                with (self._folder / PROBLEMS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        assert rollout.episode is not None
        return {"session": name, "turns": len(rollout.episode.turns), "tokens": rollout.generated_length}


class _Session:
    """One session; its requests come one after the other."""

    def __init__(self, name: str, episode: RunningEpisode, draw: Draw):
        self._name, self._episode, self._draw = name, episode, draw
        self._conversation = Conversation()
        self._turn = threading.Lock()

    def ask(self, body: Any) -> Mapping[str, Any]:
        if not self._turn.acquire(blocking=False):
            raise ChatError(400, f"session {self._name} has a request under way; a session is one conversation")
        try:
            self._goes_on()
            request = self._conversation.continued_by(body)
            reply = self._reply(request)
            choice = self._conversation.replied(self._episode.replies[-1], self._episode.ended is not None)
            before, own = len(reply.prompt.token_ids), len(reply.response_ids)
            usage = {"prompt_tokens": before, "completion_tokens": own, "total_tokens": before + own}
            return completion(choice, request.model, usage)
        finally:
            self._turn.release()

    def ended(self, rewards: Mapping[str, float]) -> Rollout:
        """The episode with its rewards."""
        with self._turn:
            if not self._episode.replies:
                raise ChatError(400, f"session {self._name} has no reply to be rewarded")
            self._episode.reward(rewards)
            if self._episode.ended is None:
                self._episode.observe(Reply(Answer(done=True)))
            return replace(self._episode.rollout(), seed=NO_SEED)

    def _reply(self, request: ChatRequest) -> Rollout:
        shown = sum(one.role == "tool" for one in request.messages)
        self._episode.observe(Reply(Answer(request.messages, calls=shown, tools=request.tools)))
        self._goes_on()
        wanted = self._episode.next_turn()
        assert wanted.sampling is not None
        try:
            rollout = self._draw(wanted, wanted.sampling)
        except ChatError as error:  # its context has the new messages, and no reply behind them
            self._episode.fail(f"crashed: {error}")
            raise
        self._episode.hear(rollout)
        return rollout

    def _goes_on(self) -> None:
        if self._episode.ended is not None:
            why = self._episode.failure or f"its limit of {self._episode.ended} is reached"
            raise ChatError(400, f"session {self._name} has ended: {why}")


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") >> 1


def _rewards(body: Any) -> dict[str, float]:
    given: Any = body.get("reward") if isinstance(body, Mapping) else None
    parts = given if isinstance(given, Mapping) else {REWARD: given}
    try:
        found = {str(name): float(value) for name, value in parts.items()}
    except (TypeError, ValueError):
        found = {}
    if REWARD not in found or not all(map(math.isfinite, found.values())):
        raise ChatError(400, 'give {"reward": 1.0}, or parts by name of which one is "reward"')
    return found
