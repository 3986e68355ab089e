"""One hundred hostile tools beside well-behaved ones: every episode ends, and the neighbours' results are right.

Their programs hang, crash, kill themselves, flood, fork, write what is no text, fill memory, or answer nonsense. Forks
are bounded: that a fork bomb ends at its limit is tests/verifiers/test_sandbox.py's part.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import psutil
import pytest

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments import EnvironmentPool, Message, Problem
from owpo_megatron.environments.pool import Call, Reply
from owpo_megatron.types import Prompt

HOSTILE, NEIGHBOURS, STEPS = 100, 20, 3
KINDS = ("hang", "spin", "exit", "kill", "flood", "fork", "bytes", "memory", "nonsense", "error")
ENDS = {"hang": ("timeout",), "spin": ("timeout",)}
"""How their episodes fail; on a busy machine any of the others may be late as well. One that leaves processes behind
loses its own with them, and again when it goes through its replies once more."""
SURVIVE = ("flood", "bytes", "neighbour")


class Tool:
    """Does what the problem's id names at its second step; a neighbour counts."""

    def reset(self, problem: Problem) -> list[Message]:
        self.kind, self.steps = problem.id.partition("/")[0], 0
        return [Message("user", "go")]

    def step(self, reply: str):  # type: ignore[no-untyped-def]
        self.steps += 1
        if self.kind == "neighbour" or self.steps != 2:
            return f"{reply}{self.steps}", False, None
        return getattr(self, self.kind)()

    def hang(self) -> None:
        time.sleep(600)

    def spin(self) -> None:
        while True:
            pass

    def exit(self) -> None:
        os._exit(1)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def flood(self) -> tuple[str, bool, None]:
        return "\0\x1b[2J" * 5_000_000, False, None

    def fork(self) -> tuple[str, bool, None]:
        for _ in range(5):
            if os.fork() == 0:
                os.setsid()
                os.execvp("sleep", ["sleep", "3123"])
        return "forked", False, None

    def bytes(self) -> tuple[str, bool, None]:
        return bytes_of_no_text(), False, None

    def memory(self) -> None:
        self.kept = [bytearray(2**28) for _ in range(1000)]

    def nonsense(self) -> object:
        return {"observation": object()}

    def error(self) -> None:
        raise SystemError("\ud800")


def bytes_of_no_text() -> str:
    return bytes(range(128, 256)).decode("utf-8", "surrogateescape")


@pytest.mark.process
@pytest.mark.slow
def test_one_hundred_hostile_tools_and_their_neighbours() -> None:
    pool = EnvironmentPool(EnvironmentConfig(name="python:test_hostile:Tool", workers=2, timeout=1.0, memory_gb=1))
    names = [f"{KINDS[index % len(KINDS)]}/{index}" for index in range(HOSTILE)]
    for index in range(NEIGHBOURS):
        names.insert(index * (HOSTILE // NEIGHBOURS + 1), f"neighbour/{index}")
    ends: dict[str, Reply] = {}
    try:
        for count in range(STEPS + 1):  # all of them step by step, side by side
            for number, name in enumerate(names):
                if name in ends:
                    continue
                prompt = Prompt(name, (1,), "go", "", messages=(("user", "go"),))
                reply = pool.ask(Call(number, prompt, ("a", "b", "c")[:count]))
                if reply.answer is None or count == STEPS:
                    ends[name] = reply
    finally:
        pool.close()
    for name, reply in ends.items():
        kind = name.partition("/")[0]
        if kind not in SURVIVE:
            failure = ENDS.get(kind, ("crashed", "timeout"))
            assert reply.answer is None and reply.failure.startswith(failure), (name, reply)
        else:
            assert reply.answer is not None and reply.answer.messages[0].content == "c3", (name, reply)
    assert Counter(name.partition("/")[0] for name in ends) == {**dict.fromkeys(KINDS, 10), "neighbour": 20}
    left = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "3123"]]
    assert not left, "a tool's children outlived it"
