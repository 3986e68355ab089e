"""A hundred hostile tools beside well-behaved ones: every episode ends, and the neighbours' results are right.

They hang, crash, kill themselves, flood, leave processes behind, write what is no text, fill memory, answer nonsense,
or run a policy's fork bomb in the sandbox, whose limit of processes is looked at first, with fifty forks.
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
from owpo_megatron.environments.python_tool import PythonTool
from owpo_megatron.types import Prompt
from owpo_megatron.verifiers.sandbox import why_refused

HOSTILE, NEIGHBOURS, STEPS = 110, 20, 3
KINDS = ("hang", "spin", "exit", "kill", "flood", "fork", "bytes", "memory", "nonsense", "error", "bomb")
ENDS = {"hang": ("timeout",), "spin": ("timeout",)}
"""How their episodes fail; on a busy machine any of the others may be late as well. One that leaves processes behind
loses its own with them, and again when it goes through its replies once more."""
SURVIVE = ("flood", "bytes", "neighbour")
MAY_BE_LATE = "bomb"  # survives, too, where the sandbox has ended within the step's time
PROCESSES = 12
ISOLATION = "namespaces" if why_refused() is None else "process"
FIFTY_FORKS = """
import os, time
started = 0
for _ in range(50):
    try:
        if not os.fork():
            time.sleep(60)
        started += 1
    except OSError:
        pass
print("started", started)
"""
BOMB = """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(0.05)
"""


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

    def bomb(self) -> tuple[str, bool, None]:
        return sandboxed(BOMB, 0.5), False, None

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


def sandboxed(program: str, seconds: float) -> str:
    tool = PythonTool(seconds=seconds, processes=PROCESSES, isolation=ISOLATION)
    return tool.call({"code": program})


@pytest.mark.process
@pytest.mark.slow
def test_one_hundred_hostile_tools_and_their_neighbours() -> None:
    told = sandboxed(FIFTY_FORKS, 10)
    assert told.startswith("started ") and int(told.split()[1]) < PROCESSES, "no bomb where the limit does not hold"
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
        if kind == MAY_BE_LATE and reply.answer is None:
            assert reply.failure.startswith("timeout"), (name, reply)
        elif kind not in (*SURVIVE, MAY_BE_LATE):
            failure = ENDS.get(kind, ("crashed", "timeout"))
            assert reply.answer is None and reply.failure.startswith(failure), (name, reply)
        else:
            assert reply.answer is not None and reply.answer.messages[0].content == "c3", (name, reply)
    assert Counter(name.partition("/")[0] for name in ends) == {**dict.fromkeys(KINDS, 10), "neighbour": 20}
    left = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "3123"]]
    assert not left, "a tool's children outlived it"
