"""Agents as users write them, with the official client; for test_agents.py."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any

from owpo_megatron.environments import Problem

TOOLS = [{"type": "function", "function": {"name": "double", "description": "twice x", "parameters": {}}}]


def chat(client: Any, problem: Problem, style: float = 0.0) -> dict[str, float]:
    """Three turns, in each of which the policy hears its reply again."""
    messages = [{"role": "system", "content": "echo"}, {"role": "user", "content": problem.text}]
    for turn in range(3):
        found = client.chat.completions.create(model="policy", messages=messages, temperature=0.1)
        messages.append({"role": "assistant", "content": found.choices[0].message.content})
        messages.append({"role": "user", "content": f"{turn}: {found.choices[0].message.content}"})
    return {"reward": 1.0, "style": style}


async def streaming(client: Any, problem: Problem) -> float:
    """The loop of an asynchronous framework, and a call of a tool."""
    import json

    messages: list[dict[str, Any]] = [{"role": "user", "content": problem.text}]
    stream = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS, stream=True)
    calls = []
    async for chunk in stream:
        calls += chunk.choices[0].delta.tool_calls or [] if chunk.choices else []
    (call,) = calls
    x = json.loads(call.function.arguments)["x"]
    told = {"id": call.id, "type": "function", "function": {"name": "double", "arguments": call.function.arguments}}
    messages.append({"role": "assistant", "content": None, "tool_calls": [told]})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": str(2 * x)})
    found = await client.chat.completions.create(model="policy", messages=messages, tools=TOOLS)
    return float(found.choices[0].message.content == problem.answer)


def unjudged(client: Any, problem: Problem) -> None:
    client.chat.completions.create(model="policy", messages=[{"role": "user", "content": problem.text}])


def wandering(client: Any, problem: Problem) -> float:
    for text in ("one conversation", "another"):
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": text}])
    return 1.0


def silent(client: Any, problem: Problem) -> float:
    return 1.0


def forking(client: Any, problem: Problem) -> float:
    """Leaves a process behind, with a session of its own, and never comes back."""
    subprocess.Popen(["sleep", problem.answer], start_new_session=True)
    client.chat.completions.create(model="policy", messages=[{"role": "user", "content": problem.text}])
    time.sleep(600)
    return 1.0


def dying(client: Any, problem: Problem) -> float:
    client.chat.completions.create(model="policy", messages=[{"role": "user", "content": problem.text}])
    os.kill(os.getpid(), 9)
    return 1.0
