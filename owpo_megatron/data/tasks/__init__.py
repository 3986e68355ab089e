"""Generated tasks with verifiable answers, made from fixed seeds: no download, no two machines differ.

A task is small enough to be warmed up and trained on a CPU in minutes. Add one by writing a file with a `Task` and
listing it in `TASKS`; its verifier rule of the same name goes to verifiers/rules.py.
"""

from __future__ import annotations

from owpo_megatron.data.tasks.base import Task
from owpo_megatron.data.tasks.cipher import Cipher
from owpo_megatron.data.tasks.countdown import Countdown
from owpo_megatron.data.tasks.lookup import Lookup
from owpo_megatron.data.tasks.sums import Sums
from owpo_megatron.errors import UserError

TASKS: dict[str, Task] = {"cipher": Cipher(), "countdown": Countdown(), "lookup": Lookup(), "sums": Sums()}


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError("data.source", f"task:{name}", f"no such task; known: {', '.join(sorted(TASKS))}")
    return TASKS[name]


__all__ = ["TASKS", "Cipher", "Countdown", "Lookup", "Sums", "Task", "get_task"]
