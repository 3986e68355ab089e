"""Environments that give the policy tools: a reply that calls none is the answer, which the verifier's rule grades.

A call is written as the field's models are trained to (Hermes, Qwen):

    <tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call>
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from owpo_megatron.environments.protocol import Message, Observation, Problem

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
MAX_CALLS = 16  # of one reply
INSTRUCTION = """You may call a tool before you answer. For each call, write JSON with its name and its arguments:
<tool_call>{{"name": "...", "arguments": {{...}}}}</tool_call>
You are shown the results and go on. A reply without a call is your answer. The tool, as a JSON schema:
{schema}"""


class ToolError(Exception):
    """A call that the tool refuses, with the reason that the policy is shown."""


class ToolEnvironment(abc.ABC):
    """Base of environments with one tool. Subclasses set the class attributes and write `call`.

    Args:
        instruction: the system message; "": none, e.g. where the chat template has one of its own.
    """

    name = ""
    description = ""
    parameters: Mapping[str, str] = {}
    """What the arguments mean, by name; all are texts."""

    def __init__(self, instruction: str | None = None):
        self._instruction = INSTRUCTION.format(schema=json.dumps(self.schema())) if instruction is None else instruction

    @abc.abstractmethod
    def call(self, arguments: Mapping[str, str]) -> str:
        """The result that the policy is shown.

        Raises:
            ToolError: it is shown this reason instead.
        """

    def schema(self) -> dict[str, Any]:
        properties = {name: {"type": "string", "description": text} for name, text in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(properties)[:1]}
        return {"name": self.name, "description": self.description, "parameters": parameters}

    def reset(self, problem: Problem) -> Sequence[Message]:
        if not self._instruction:
            return problem.messages
        first, *others = problem.messages
        if first.role == "system":
            return (Message("system", f"{first.content}\n\n{self._instruction}"), *others)
        return (Message("system", self._instruction), first, *others)

    def step(self, reply: str) -> tuple[Observation, bool, None]:
        calls = CALL.findall(reply.rpartition("</think>")[2])
        if not calls:
            return Observation("", calls=0), True, None
        results, errors = [], 0
        for text in calls[:MAX_CALLS]:
            try:
                results.append(self.call(self._arguments(text)))
            except ToolError as refused:
                results.append(f"error: {refused}")
                errors += 1
        if len(calls) > MAX_CALLS:
            results.append(f"error: the calls after the first {MAX_CALLS} were left out")
        return Observation("\n".join(results), len(results), errors + max(0, len(results) - MAX_CALLS)), False, None

    def _arguments(self, text: str) -> dict[str, str]:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            raise ToolError("the call is no JSON") from None
        if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
            raise ToolError('a call is {"name": ..., "arguments": {...}}')
        if call.get("name") != self.name:
            raise ToolError(f"there is no tool {call.get('name')!r:.40}; the tool is {self.name}")
        unknown = sorted(set(call["arguments"]) - set(self.parameters))
        if unknown:
            raise ToolError(f"no argument {unknown[0]!r:.40}; known: {', '.join(self.parameters)}")
        missing = [name for name in self.schema()["parameters"]["required"] if name not in call["arguments"]]
        if missing:
            raise ToolError(f"the argument {missing[0]} is missing")
        return {name: str(value) for name, value in call["arguments"].items()}
