"""The OpenAI chat protocol, from the policy's side: which messages of a request are new, and how a reply is answered.

An agent sends its whole conversation with every request. Its earlier replies are in it as text, and are compared with
what the policy wrote, never rendered: tokens stay those of the engine. So a request has to continue the conversation:
the same messages, the policy's last reply, and new ones behind it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from owpo_megatron.data.problem import Message
from owpo_megatron.environments.tools import CALL

ROLES = ("system", "user", "tool")


class ChatError(Exception):
    """A request that cannot be answered; the agent gets the reason as the protocol has it.

    Args:
        status: the HTTP answer's.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": "invalid_request_error", "param": None, "code": None}}


@dataclass(frozen=True)
class ChatRequest:
    """One request of an agent: what it adds to the conversation.

    Example:
        ChatRequest((Message("user", "6 * 7?"),), model="policy")
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    model: str = "policy"
    streams: bool = False


@dataclass
class Conversation:
    """Holds the messages of an agent and the policy so far.

    Raises:
        ChatError: (continued_by) a request that does not continue it, or wants what cannot be recorded.
    """

    _said: list[tuple[str, frozenset[str]]] = field(default_factory=list)  # (role, texts that stand for the message)
    _tools: tuple[Mapping[str, Any], ...] = ()
    turns: int = 0

    def continued_by(self, body: Any) -> ChatRequest:
        """The new part of a request, which becomes a part of the conversation."""
        request = _parsed(body)
        said = [(one.role, one.content) for one in request.messages]
        if self.turns and request.tools != self._tools:
            raise ChatError(400, "the tools changed within a conversation; the template writes them at its beginning")
        known = len(self._said)
        for place, ((role, texts), (own_role, own)) in enumerate(zip(self._said, said, strict=False)):
            if role != own_role or own.strip() not in texts:
                told = f"message {place} of the request is not that of the conversation so far"
                raise ChatError(400, f"{told}; an episode is one conversation, to which each request adds")
        new = request.messages[known:]
        if not new:
            raise ChatError(400, "the request adds no message to the conversation")
        if new[-1].role == "assistant" or (self.turns and any(one.role == "assistant" for one in new)):
            raise ChatError(400, "a reply in the request that the policy did not write")
        self._said += [(one.role, frozenset([one.content.strip()])) for one in new]
        self._tools = request.tools
        return ChatRequest(new, request.tools, request.model, request.streams)

    def replied(self, reply: str, truncated: bool = False) -> dict[str, Any]:
        """Take over the policy's reply, and return the choice that the agent gets."""
        text, calls = reply, list[dict[str, Any]]()
        if self._tools:
            text, calls = _calls(reply, self.turns)
        answers = {reply, text, reply.rpartition("</think>")[2], text.rpartition("</think>")[2]}
        self._said.append(("assistant", frozenset(one.strip() for one in answers)))
        self.turns += 1
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
        if calls:
            message["tool_calls"] = calls
        reason = "length" if truncated else "tool_calls" if calls else "stop"
        return {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}


def completion(choice: Mapping[str, Any], model: str, usage: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The answer of POST /v1/chat/completions."""
    found = _head("chat.completion", model) | {"choices": [dict(choice)]}
    return found if usage is None else found | {"usage": dict(usage)}


def streamed(found: Mapping[str, Any]) -> Iterator[bytes]:
    """The same as server-sent events: a reply in one piece, and its end."""
    (choice,) = found["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(delta["tool_calls"])]
    head = {name: found[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    last = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    usage = {"usage": found["usage"]} if "usage" in found else {}
    for chunk in ({"index": 0, "delta": delta, "finish_reason": None}, last):
        more = usage if chunk is last else {}
        yield b"data: " + json.dumps(head | {"choices": [chunk]} | more).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def models(name: str) -> dict[str, Any]:
    """The answer of GET /v1/models."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "owpo"}]}


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _parsed(body: Any) -> ChatRequest:
    if not isinstance(body, Mapping) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise ChatError(400, "a request has a list of messages")
    for name, only in (("n", 1), ("logprobs", False), ("response_format", None)):
        if body.get(name) not in (None, only):
            raise ChatError(400, f"{name} is not supported here; leave it out")
    tools = body.get("tools") or ()
    if body.get("tool_choice") not in (None, "auto") and tools:
        raise ChatError(400, "tool_choice is not supported here; leave it out")
    messages = tuple(map(_message, body["messages"]))
    return ChatRequest(messages, tuple(tools), str(body.get("model", "policy")), bool(body.get("stream")))


def _message(plain: Any) -> Message:
    role = plain.get("role") if isinstance(plain, Mapping) else None
    role = "system" if role == "developer" else role
    if role not in (*ROLES, "assistant"):
        raise ChatError(400, f"a message of the role {role!r:.40}; known: {', '.join(ROLES)}, assistant")
    content = plain.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise ChatError(400, "a message with parts that are no text; the policy reads texts only")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ChatError(400, f"a message with the content {content!r:.40}; give a text")
    return Message(role, content or "")


def _calls(reply: str, turn: int) -> tuple[str, list[dict[str, Any]]]:
    """(text without tool calls, the calls). What is no call stays text."""
    before, thought, rest = reply.rpartition("</think>")
    found: list[dict[str, Any]] = []

    def take(match: Any) -> str:
        try:
            call = json.loads(match[1])
            name, arguments = call["name"], json.dumps(call["arguments"])
        except (ValueError, RecursionError, KeyError, TypeError):
            return str(match[0])
        number = f"call_{turn}_{len(found)}"
        found.append({"id": number, "type": "function", "function": {"name": str(name), "arguments": arguments}})
        return ""

    text = CALL.sub(take, rest)
    return (before + thought + text).strip() if found else reply, found
