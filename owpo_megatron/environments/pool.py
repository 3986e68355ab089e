"""Environments in processes that can be killed. Each episode has one of the processes as its home.

    calling thread            a thread per process                process (guard and worker of the verifier's pool)
        submit(call)  --->        reset, or the next step   --->      EnvironmentRule: instance of that episode
        then(result)  <---        ... or all of them again, where the process was killed for another episode

A step that hangs or crashes costs its own episode: the process is replaced, and the other episodes' instances are made
anew from their problems and replies when they are needed next.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments.catalogue import EnvironmentMaker
from owpo_megatron.environments.protocol import Answer
from owpo_megatron.environments.worker import EnvironmentRule, parse
from owpo_megatron.types import GradingItem, Prompt, Verdict
from owpo_megatron.verifiers import VerifierPool

DOMAIN = "environment"


@dataclass(frozen=True)
class Call:
    """The next step of an episode: its reset where there are no replies yet; None: it is over."""

    episode: int
    prompt: Prompt
    replies: tuple[str, ...] | None


@dataclass(frozen=True)
class Reply:
    """Result of a call: an answer, or how the environment failed."""

    answer: Answer | None
    seconds: float = 0.0  # since the call was submitted
    failure: str = ""  # e.g. "timeout: no verdict within 10.0 s"
    fatal: Exception | None = None  # the pool itself is broken


class EnvironmentPool:
    """Runs environments; safe to use from any thread.

    Raises:
        UserError: there is no such environment, or it does not take its arguments.
    """

    def __init__(self, config: EnvironmentConfig):
        make = EnvironmentMaker(config.name, config.args).check()
        self._homes = [_Home(make, config) for _ in range(config.workers)]

    def submit(self, call: Call, then: Callable[[Reply], None]) -> None:
        """Begin a step; `then` gets its result in another thread. One call of an episode at a time."""
        self._homes[call.episode % len(self._homes)].calls.put((time.monotonic(), call, then))

    def ask(self, call: Call) -> Reply:
        """The same, and wait for it."""
        found: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self.submit(call, found.put)
        return found.get()

    def forget(self, episode: int, prompt: Prompt) -> None:
        """Let go of an episode that did not end by itself."""
        self.submit(Call(episode, prompt, None), lambda reply: None)

    def close(self) -> None:
        for home in self._homes:
            home.close()


class _Home:
    """One process, and the thread that waits for it."""

    def __init__(self, make: EnvironmentMaker, config: EnvironmentConfig):
        rule = EnvironmentRule(make, config.role)
        memory = int(config.memory_gb * 2**30)
        self._own_process = make.own_process
        self._pool = VerifierPool(
            {DOMAIN: rule}, 1, config.timeout, memory_bytes=memory, keeps_children=self._own_process
        )
        self.calls: queue.SimpleQueue[tuple[float, Call, Callable[[Reply], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="environments", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.calls.put(None)
        self._pool.close()  # ends a step under way, too
        self._thread.join()

    def _run(self) -> None:
        while (work := self.calls.get()) is not None:
            since, call, then = work
            try:
                answer, failure, fatal = *self._answer(call), None
            except Exception as error:  # the caller's thread has to hear of it
                answer, failure, fatal = None, "", error
            then(Reply(answer, time.monotonic() - since, failure, fatal))

    def _answer(self, call: Call) -> tuple[Answer | None, str]:
        if call.replies is None:
            self._order(call, None)
            return None, ""
        position = len(call.replies)
        answer, failure = self._order(call, position)
        if answer is None and not failure and self._own_process:
            return None, "crashed: its process was lost, with that of the environments beside it"
        if answer is None and not failure:  # its instance went with its process
            for again in range(position + 1):
                answer, failure = self._order(call, again)
                if answer is None:
                    return None, failure or "crashed: its process was lost twice; a step may leave no process behind"
        return answer, failure

    def _order(self, call: Call, position: int | None) -> tuple[Answer | None, str]:
        """(answer, ""), (None, failure), or (None, "") where the process does not know the episode."""
        order: dict[str, object] = {"episode": call.episode, "position": position}
        if position == 0:
            prompt = call.prompt
            messages = prompt.messages or (("user", prompt.text),)
            problem = {"id": prompt.id, "answer": prompt.answer, "domain": prompt.domain, "messages": messages}
            order["problem"] = problem
        elif position is not None:
            assert call.replies is not None
            order["reply"] = call.replies[position - 1]
        (verdict,) = self._pool.score([GradingItem(json.dumps(order), "", DOMAIN)])
        if not verdict.correct:
            return None, _told(verdict)
        found = json.loads(verdict.detail) if verdict.detail else {"known": False}
        return (parse(found), "") if found["known"] else (None, "")


def _told(verdict: Verdict) -> str:
    return f"{verdict.reason}: {verdict.detail}"
