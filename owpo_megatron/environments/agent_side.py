"""Side of the agent's process: the agent, and the endpoint that it asks. Two pipes lead to the environment."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from owpo_megatron.data.problem import Problem
from owpo_megatron.environments.chat import ChatError, Conversation, completion
from owpo_megatron.environments.endpoint import ChatEndpoint

MODEL = "policy"
KEY = "none"  # a client wants one
FAILURE = 400  # characters of it


class AgentSide:
    """One episode, in a process of its own.

    Args:
        replies: descriptor with the policy's replies, a line of JSON each.
        done: descriptor for what the agent does: {messages, tools}, {reward} or {failure}, a line of JSON each.
    """

    def __init__(self, replies: int, done: int):
        self._replies = os.fdopen(replies, "rb")
        self._done = os.fdopen(done, "wb")
        self._conversation = Conversation()
        self._turn = threading.Lock()  # of the policy: one request at a time

    def play(self, agent: Callable[..., Any], problem: Problem, args: Mapping[str, Any]) -> None:
        """Run the agent to its end."""
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
        endpoint = ChatEndpoint(self._answer, MODEL)
        url = f"http://127.0.0.1:{endpoint.port}/v1"
        try:
            reward = _run(agent, url, problem, args)
            self._tell(reward=reward)
        except BaseException as error:  # an agent may raise anything; its episode has failed
            self._tell(failure=f"{type(error).__name__}: {error}"[:FAILURE])

    def _answer(self, path: str, headers: Mapping[str, str], body: Any) -> Mapping[str, Any]:
        if not path.partition("?")[0].endswith("/chat/completions"):
            raise ChatError(404, f"{path} is not served here; use /v1/chat/completions")
        if not self._turn.acquire(blocking=False):
            raise ChatError(400, "another request is under way; one episode is one conversation")
        try:
            request = self._conversation.continued_by(body)
            self._tell(messages=[(one.role, one.content) for one in request.messages], tools=list(request.tools))
            line = self._replies.readline()
            if not line:
                raise ChatError(410, "the episode is over")
            return completion(self._conversation.replied(json.loads(line)), request.model)
        finally:
            self._turn.release()

    def _tell(self, **what: Any) -> None:
        self._done.write(json.dumps(what).encode() + b"\n")
        self._done.flush()


def _run(agent: Callable[..., Any], url: str, problem: Problem, args: Mapping[str, Any]) -> Any:
    import openai

    if inspect.iscoroutinefunction(agent):
        return asyncio.run(agent(openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0), problem, **args))
    return agent(openai.OpenAI(base_url=url, api_key=KEY, max_retries=0), problem, **args)
