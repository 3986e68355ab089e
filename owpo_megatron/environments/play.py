"""An environment played by hand: for trying one out, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments.pool import Call, EnvironmentPool
from owpo_megatron.environments.protocol import Answer, Problem
from owpo_megatron.errors import RunError
from owpo_megatron.types import Prompt


def play(limits: EnvironmentConfig, problem: Problem, replies: Sequence[str]) -> list[Answer]:
    """Return what the environment answers to the reset and to each reply, up to the end of the episode.

    It runs in a process of its own, within the configuration's limits, as in a run.

    Raises:
        UserError: there is no such environment, or it does not take its arguments.
        RunError: a step failed.
    """
    messages = tuple((one.role, one.content) for one in problem.messages) or (("user", problem.text),)
    prompt = Prompt(problem.id, (), problem.text, problem.answer, problem.domain, messages=messages)
    pool, answers = EnvironmentPool(limits.model_copy(update={"workers": 1})), []
    try:
        for count in range(len(replies) + 1):
            reply = pool.ask(Call(0, prompt, tuple(replies[:count])))
            if reply.fatal is not None:
                raise reply.fatal
            if reply.answer is None:
                raise RunError(f"step {count} of {limits.name}: {reply.failure}")
            answers.append(reply.answer)
            if reply.answer.done:
                break
    finally:
        pool.close()
    return answers
