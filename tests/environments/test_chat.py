"""The OpenAI chat protocol: what a request adds, what is refused, tool calls, streams. Real clients: test_agents.py."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from owpo_megatron.data.problem import Message
from owpo_megatron.environments.chat import ChatError, Conversation, completion, streamed
from owpo_megatron.environments.endpoint import ChatEndpoint

ASKED = {"role": "user", "content": "6 * 7?"}
TOOLS = [{"type": "function", "function": {"name": "times", "parameters": {"type": "object"}}}]


def request(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "policy", "messages": list(messages)} | more


def begun(reply: str, **more: Any) -> tuple[Conversation, dict[str, Any]]:
    conversation = Conversation()
    assert conversation.continued_by(request(ASKED, **more)).messages == (Message("user", "6 * 7?"),)
    return conversation, conversation.replied(reply)


def test_a_request_adds_what_is_behind_the_last_reply() -> None:
    conversation, choice = begun(" 41 ")
    assert choice["message"] == {"role": "assistant", "content": " 41 "} and choice["finish_reason"] == "stop"
    wrong = {"role": "user", "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "!"}]}
    added = conversation.continued_by(request(ASKED, {"role": "assistant", "content": "41"}, wrong))
    assert added.messages == (Message("user", "no!"),)
    assert conversation.turns == 1


def test_reasoning_may_be_left_out_of_the_reply_that_comes_back() -> None:
    conversation, _ = begun("<think>\nhm\n</think>\n\n42")
    added = conversation.continued_by(request(ASKED, {"role": "assistant", "content": "42"}, ASKED))
    assert added.messages == (Message("user", "6 * 7?"),)


def test_tool_calls_are_the_protocols_and_their_results_are_new_messages() -> None:
    call = '<tool_call>{"name": "times", "arguments": {"a": 6, "b": 7}}</tool_call>'
    conversation, choice = begun(f"I ask.\n{call}", tools=TOOLS)
    (told,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "I ask." and choice["finish_reason"] == "tool_calls"
    assert told["function"]["name"] == "times" and json.loads(told["function"]["arguments"]) == {"a": 6, "b": 7}
    back = [ASKED, choice["message"], {"role": "tool", "tool_call_id": told["id"], "content": "42"}]
    assert conversation.continued_by(request(*back, tools=TOOLS)).messages == (Message("tool", "42"),)


@pytest.mark.parametrize("reply", ["<tool_call>6 * 7</tool_call>", "<tool_call>{}</tool_call>", "42"])
def test_what_is_no_call_stays_text(reply: str) -> None:
    _, choice = begun(reply, tools=TOOLS)
    assert choice["message"] == {"role": "assistant", "content": reply} and choice["finish_reason"] == "stop"


def test_without_tools_nothing_is_read_as_a_call() -> None:
    call = '<tool_call>{"name": "times", "arguments": {}}</tool_call>'
    assert begun(call)[1]["message"] == {"role": "assistant", "content": call}


REPLIED = {"role": "assistant", "content": "41"}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (request(ASKED, REPLIED), "adds no message"),
        (request({"role": "user", "content": "5 * 7?"}, REPLIED, ASKED), "message 0 of the request is not that"),
        (request(ASKED, {"role": "assistant", "content": "43"}, ASKED), "message 1 of the request is not that"),
        (request(ASKED, REPLIED, ASKED, REPLIED), "a reply in the request that the policy did not write"),
        (request(ASKED, REPLIED, ASKED, tools=TOOLS), "the tools changed"),
        (request(ASKED, REPLIED, ASKED, n=2), "n is not supported"),
        (request(ASKED, REPLIED, ASKED, logprobs=True), "logprobs is not supported"),
        (request(ASKED, REPLIED, {"role": "user", "content": [{"image_url": "x"}]}), "parts that are no text"),
        (request(ASKED, REPLIED, {"role": "critic", "content": "x"}), "a message of the role 'critic'"),
        ({"model": "policy"}, "a list of messages"),
        ([], "a list of messages"),
    ],
)
def test_a_request_that_cannot_be_recorded_is_refused_and_changes_nothing(body: Any, told: str) -> None:
    conversation, _ = begun("41")
    with pytest.raises(ChatError, match=told) as refused:
        conversation.continued_by(body)
    assert refused.value.status == 400
    assert conversation.continued_by(request(ASKED, REPLIED, ASKED)).messages == (Message("user", "6 * 7?"),)


def test_a_stream_has_the_reply_its_end_and_the_counts() -> None:
    _, choice = begun("42")
    found = completion(choice, "policy", {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
    *events, end = [event.decode().removeprefix("data: ").strip() for event in streamed(found)]
    first, last = map(json.loads, events)
    assert end == "[DONE]" and first["choices"][0]["delta"]["content"] == "42"
    assert last["choices"][0]["finish_reason"] == "stop" and last["usage"]["total_tokens"] == 5
    assert first["object"] == "chat.completion.chunk" and first["id"] == last["id"] == found["id"]


def test_the_endpoint_answers_and_refuses() -> None:
    def answer(path: str, headers: Any, body: Any) -> dict[str, Any]:
        if path != "/v1/chat/completions":
            raise ChatError(404, "not here")
        return {"path": path, "key": headers["authorization"], "body": body}

    endpoint = ChatEndpoint(answer, "policy")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{endpoint.port}", trust_env=False) as client:
            found = client.post("/v1/chat/completions", json={"a": 1}, headers={"Authorization": "Bearer k"})
            assert found.json() == {"path": "/v1/chat/completions", "key": "Bearer k", "body": {"a": 1}}
            assert client.get("/v1/models").json()["data"][0]["id"] == "policy"
            assert client.get("/v1").status_code == 404
            refused = client.post("/v1/embeddings", json={})
            assert refused.status_code == 404 and refused.json()["error"]["message"] == "not here"
            assert refused.headers["x-should-retry"] == "false"
            wrong = client.post("/v1/chat/completions", content=b"{", headers={"Authorization": "Bearer k"})
            assert wrong.status_code == 400 and "no JSON" in wrong.text
    finally:
        endpoint.close()
