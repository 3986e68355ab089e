"""The request that goes from the trainer's environment to NeMo-Run's: plain values, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from owpo_megatron.errors import UserError
from owpo_megatron.launch.job import Job, quoted
from owpo_megatron.launch.render import render_node


@dataclass(frozen=True)
class Request:
    """One task of an experiment: a script for every node, and the nodes.

    Example:
        Request(name="my-run", script="#!/bin/bash\\n...", nodes=3)
    """

    name: str
    script: str  # what every node executes
    nodes: int = 1
    gpus_per_node: int = 0
    time: str | None = None
    account: str | None = None
    partition: str | None = None
    exclusive: bool = True
    container: str | None = None
    mounts: list[str] = field(default_factory=list)
    prologue: list[str] = field(default_factory=list)  # lines of the batch script, before srun
    options: dict[str, str] = field(default_factory=dict)  # further options of sbatch
    retries: int = 0  # times the job is requeued when a node ends with an exit code that is not 0

    @classmethod
    def of(cls, job: Job) -> Request:
        """The task that trains a job's run.

        Raises:
            UserError: the job asks for something that NeMo-Run cannot give.
        """
        launch = job.launch
        if job.seeds or job.links > 1:
            raise UserError("--with", "nemo-run", "sweeps and chains are written in Python: see examples/nemo_run")
        if launch.container and launch.container_runtime != "pyxis":
            raise UserError("launch.container_runtime", launch.container_runtime, "NeMo-Run knows pyxis only")
        options = {"signal": f"USR1@{launch.signal_seconds}"}
        for option in launch.sbatch:
            name, equals, value = option.lstrip("-").partition("=")
            if not equals:
                raise UserError("launch.sbatch", option, "for NeMo-Run, write it as --name=value")
            options[name.replace("-", "_")] = value
        return cls(
            name=job.config.name,
            script=render_node(job),
            nodes=job.total_nodes,
            gpus_per_node=launch.gpus_per_node,
            time=launch.time,
            account=launch.account,
            partition=launch.partition,
            exclusive=launch.exclusive,
            container=launch.container,
            mounts=job.mounts() if launch.container else [],
            prologue=launch.prologue,
            options=options,
            retries=launch.max_requeues,
        )

    @classmethod
    def command(cls, name: str, command: str, job: Job) -> Request:
        """A task of one node beside a job's run: the same surroundings, one shell command in the working folder."""
        lines = ["#!/bin/bash", "set -euo pipefail", f"cd {quoted(job.workdir)}"]
        lines += [f"export {key}={quoted(value)}" for key, value in job.environment().items()]
        whole = cls.of(job)
        return cls(
            name=name,
            script="\n".join([*lines, command, ""]),
            gpus_per_node=whole.gpus_per_node,
            time=whole.time,
            account=whole.account,
            partition=whole.partition,
            exclusive=whole.exclusive,
            container=whole.container,
            mounts=whole.mounts,
            prologue=whole.prologue,
        )

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Request:
        return cls(**json.loads(file.read_text()))
