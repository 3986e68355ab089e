"""Environments of the package `verifiers` (0.4): its tasksets and harnesses, with the policy as their model.

    python -m owpo_megatron.environments.verifiers TASKSET > problems.jsonl      problems for `data.source`

The package runs an episode as an agent that asks an OpenAI endpoint, which here is the episode's own (agent.py).
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from owpo_megatron.environments.agent import AgentEnvironment
from owpo_megatron.environments.protocol import Problem
from owpo_megatron.errors import UserError

DEFAULT = {"agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}}
"""A chat loop with the taskset's tools, as a process on this machine."""
NO_ANSWER = "(the taskset judges)"  # data wants one
KEY_NAME = "OWPO_VERIFIERS_KEY"  # of an environment variable that does not exist: a client wants one


class VerifiersEnvironment(AgentEnvironment):
    """Plays the task of a taskset whose number ends the problem's id; its reward is the trace's.

    Args:
        taskset: its id, as `vf-eval` takes it; an installed package.
        config: the package's own configuration of the environment, `taskset` left out.
        seconds: time that the harness has from one request to the next.

    Raises:
        UserError: the package, the taskset or the harness is not installed.
    """

    def __init__(self, taskset: str, config: Mapping[str, Any] | None = None, seconds: float = 60.0):
        known = loaded(taskset, dict(config or DEFAULT))
        super().__init__(f"{__name__}:play", {"environment": known}, seconds)


def loaded(taskset: str, config: Mapping[str, Any]) -> Any:
    """The package's environment of a taskset."""
    try:
        package = importlib.import_module("verifiers.v1")
    except ImportError as error:
        remedy = f"this needs the package verifiers: pip install 'owpo_megatron[verifiers]' ({error})"
        raise UserError("environment.name", "verifiers", remedy) from error
    try:
        settings = package.resolve_env_config({**config, "taskset": {"id": taskset, **config.get("taskset", {})}})
        return package.load_environment(settings)
    except Exception as error:  # packages of others: they may raise anything
        reason = str(error).strip() or type(error).__name__
        given = {"taskset": taskset, "config": dict(config)}
        raise UserError("environment.args", given, f"verifiers refuses it: {reason}") from error


async def play(client: Any, problem: Problem, environment: Any) -> dict[str, float]:
    """One episode; the agent of agent.py.

    Returns:
        The reward, and the taskset's parts by their names.

    Raises:
        RuntimeError: the episode failed.
    """
    from verifiers.v1 import EvalClientConfig, ModelContext

    number = problem.id.rpartition("/")[2].partition("#")[0]
    (task,) = environment.taskset.include(idx=[int(number)])
    context = ModelContext("policy", EvalClientConfig(base_url=str(client.base_url), api_key_var=KEY_NAME))
    async with environment.serving():
        episode = await environment.run_episode(task, context)
    for error in (*episode.errors, *(error for trace in episode.traces for error in trace.errors)):
        raise RuntimeError(f"{error.type}: {error.message}")
    if len(episode.traces) != 1:
        raise RuntimeError(f"the episode has {len(episode.traces)} traces; an episode is one conversation")
    (trace,) = episode.traces
    parts = {name: one.value for name, one in trace.rewards.items() if one is not None and name != "reward"}
    return parts | {"reward": trace.reward}


def problems(taskset: str) -> list[dict[str, str]]:
    """The tasks of a taskset, as records of a data source."""
    found = []
    for task in loaded(taskset, DEFAULT).taskset:
        answer = getattr(task.data, "answer", None)
        text = task.data.prompt_text or task.data.name or taskset
        found.append({"id": f"{taskset}/{task.data.idx}", "problem": text, "answer": str(answer or NO_ANSWER)})
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        for record in problems(arguments[0]):
            print(json.dumps(record, ensure_ascii=False))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
