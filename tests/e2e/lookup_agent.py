"""The environment of the task `lookup` as an agent that somebody else wrote, with the official client."""

from __future__ import annotations

from typing import Any

from owpo_megatron.data.problem import Problem
from owpo_megatron.data.tasks.lookup import ASK, NOTHING, table_of


def solve(client: Any, problem: Problem) -> float:
    """Reads entries for the policy until it answers; 1.0 for the sum."""
    table = table_of(problem.id)
    messages: list[Any] = [{"role": "user", "content": problem.text}]
    while True:
        found = client.chat.completions.create(model="policy", messages=messages)
        reply = found.choices[0].message.content
        if not reply.endswith(ASK):
            return float(reply == problem.answer)
        entry = table.get(reply.removesuffix(ASK))
        messages.append({"role": "assistant", "content": reply})
        messages.append({"role": "user", "content": NOTHING if entry is None else str(entry)})
