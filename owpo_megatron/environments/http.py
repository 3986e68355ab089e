"""Environments that live elsewhere: the protocol over HTTP.

    POST URL {"episode": "9f...", "reset": {"id", "text", "answer", "domain", "messages"}}
         ->  {"messages": [{"role", "content"}]}
    POST URL {"episode": "9f...", "step": 1, "reply": "..."}
         ->  {"observation": "..." or messages, "done": false, "rewards": {"reward": 1.0}, "calls": 1, "errors": 0}

`step` counts from 1 within an episode; an episode's name is never used for another.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from owpo_megatron.environments.protocol import Message, Observation, Problem, Rewards, Shown
from owpo_megatron.verifiers.external import HttpRule


class HttpEnvironment:
    """A client of one.

    Args:
        timeout: seconds of one request; environment.timeout holds anyway.
        proxy: go through the proxy of the environment (http_proxy).
    """

    def __init__(self, url: str, timeout: float = 60.0, proxy: bool = False):
        self._http = HttpRule(url, timeout, proxy)

    def reset(self, problem: Problem) -> Sequence[Message]:
        self._episode, self._steps = secrets.token_hex(16), 0
        messages = [{"role": one.role, "content": one.content} for one in problem.messages]
        plain = {"id": problem.id, "text": problem.text, "answer": problem.answer, "domain": problem.domain}
        found = self._post(reset=plain | {"messages": messages})["messages"]
        return [Message(one["role"], one["content"]) for one in found]

    def step(self, reply: str) -> tuple[Shown, bool, Rewards]:
        self._steps += 1
        found = self._post(step=self._steps, reply=reply)
        shown = found.get("observation", "")
        if isinstance(shown, str):
            shown = Observation(shown, int(found.get("calls", bool(shown))), int(found.get("errors", 0)))
        return shown, bool(found["done"]), found.get("rewards")

    def _post(self, **body: Any) -> dict[str, Any]:
        found = json.loads(self._http.post(json.dumps({"episode": self._episode} | body).encode()))
        if not isinstance(found, dict):
            raise TypeError(f"{self._http.url} replied {found!r:.100}, not an object")
        return found
