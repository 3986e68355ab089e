"""An agent as environment: a loop of somebody else's that asks by the OpenAI chat protocol and decides what is next.

              run's process                            agent's process, forked for the episode
    reset --> waits                                    agent(client, problem)
                 <------- first request's messages --- POST /v1/chat/completions, which waits
    policy's turn
    step  -->    -------- reply --------------------->  ... gets its completion, calls its tools
                 <------- new messages --------------- POST /v1/chat/completions
                 <------- reward --------------------- return

So it is an environment like the others: turns, tokens, log-probs and seeds are those of any episode, and the policy's
replies are never rendered again. The agent's process has its own time limit and ends with its episode.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from owpo_megatron.environments.agent_side import AgentSide
from owpo_megatron.environments.protocol import Message, Opening, Problem, Rewards, Shown
from owpo_megatron.errors import UserError
from owpo_megatron.verifiers.sandbox.jail import descendants

CHUNK = 65536


class AgentEnvironment:
    """Runs `agent(client, problem, **args) -> reward` for each episode.

    `client` is an `openai.OpenAI` (for an `async def` an `openai.AsyncOpenAI`) whose base_url belongs to the episode; a
    framework of its own takes `str(client.base_url)` and `client.api_key`. The reward is a number, parts by name, or
    None, where the verifier's rule judges the last reply.

    Args:
        function: MODULE:FUNCTION.
        args: further arguments of the function.
        seconds: time that the agent has from one request to the next, then it is killed; below `environment.timeout`.

    Raises:
        UserError: there is no such function, or no package `openai`.
    """

    own_process: ClassVar[bool] = True

    def __init__(self, function: str, args: Mapping[str, Any] | None = None, seconds: float = 8.0):
        self._agent = _function(function)
        self._args, self._seconds = dict(args or {}), seconds
        self._pid: int | None = None

    def reset(self, problem: Problem) -> Opening:
        self._start(problem)
        found = self._next()
        if "messages" not in found:
            raise RuntimeError("the agent ended before it asked the policy for anything")
        return Opening(_messages(found), tuple(found["tools"]))

    def step(self, reply: str) -> tuple[Shown, bool, Rewards]:
        with contextlib.suppress(BrokenPipeError):  # it has ended; its last line is the reason
            os.write(self._to_agent, json.dumps(reply).encode() + b"\n")
        found = self._next()
        if "messages" in found:
            return _messages(found), False, None
        self.close()
        return "", True, found["reward"]

    def close(self) -> None:
        """End the agent, with all that it started."""
        if self._pid is None:
            return
        for pid in [*descendants(self._pid), self._pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._to_agent)
        os.close(self._from_agent)
        self._pid = None

    def _start(self, problem: Problem) -> None:
        """Fork, since what the agent imports is here already. This process has one thread."""
        theirs, self._to_agent = os.pipe()
        self._from_agent, told = os.pipe()
        self._read = b""
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid:
            os.close(theirs)
            os.close(told)
            return
        try:
            os.setsid()
            for inherited in map(int, os.listdir("/proc/self/fd")):
                if inherited > 2 and inherited not in (theirs, told):
                    with contextlib.suppress(OSError):
                        os.close(inherited)
            AgentSide(theirs, told).play(self._agent, problem, self._args)
        finally:
            os._exit(0)

    def _next(self) -> dict[str, Any]:
        """Wait for what the agent does.

        Raises:
            TimeoutError: nothing, within its seconds.
            RuntimeError: it failed.
        """
        end = time.monotonic() + self._seconds
        try:
            while b"\n" not in self._read:
                ready, _, _ = select.select([self._from_agent], (), (), max(0.0, end - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"the agent did nothing for {self._seconds:g} s (environment.args.seconds)")
                received = os.read(self._from_agent, CHUNK)
                if not received:
                    raise RuntimeError("the agent's process ended")
                self._read += received
            line, _, self._read = self._read.partition(b"\n")
            found: dict[str, Any] = json.loads(line)
            if "failure" in found:
                raise RuntimeError(f"the agent raised {found['failure']}")
        except BaseException:
            self.close()
            raise
        return found


def _messages(found: Mapping[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(role, content) for role, content in found["messages"])


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    field = "environment.args.function"
    try:
        for large in ("openai", "openai.resources.chat", "asyncio"):  # before the fork
            importlib.import_module(large)
    except ImportError as error:
        remedy = "agents need the package openai: pip install 'owpo_megatron[openai]'"
        raise UserError(field, name, remedy) from error
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(field, name, f"make it importable, as MODULE:FUNCTION ({error})") from error
    parameters = list(inspect.signature(found).parameters)
    if len(parameters) < 2:
        raise UserError(field, name, "an agent takes (client, problem)")
    return found  # type: ignore[no-any-return]
