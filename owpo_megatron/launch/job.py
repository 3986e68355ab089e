"""What a cluster is asked for: one job, from the configuration, whichever way it is then submitted."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from owpo_megatron.config import Config
from owpo_megatron.config.launch import LaunchConfig
from owpo_megatron.run.layout import RunFolder

EnginePlace = Literal["none", "own nodes", "trainer's nodes"]


@dataclass(frozen=True)
class Job:
    """Nodes, roles and folders of a run on a cluster. Trainer nodes come first, engine nodes behind them.

    Example:
        Job(Config.load("run.yaml"), workdir=Path.cwd()).total_nodes
    """

    config: Config
    workdir: Path
    """Where the job runs: relative paths of the configuration start here. Every node sees it."""
    seeds: tuple[int, ...] = ()
    """One run a seed, as a job array; each in a folder of its own."""
    links: int = 1
    """Jobs in a row, each going on from where the one before had to stop."""

    @property
    def launch(self) -> LaunchConfig:
        return self.config.launch

    @property
    def engine_place(self) -> EnginePlace:
        if not needs_own_engine(self.config):
            return "none"
        return "own nodes" if self.launch.engine_nodes else "trainer's nodes"

    @property
    def engines_per_node(self) -> int:
        """As many as the node's GPUs allow; one on a cluster without GPUs."""
        return max(1, self.launch.gpus_per_node // self.config.engine.tp)

    @property
    def engine_nodes(self) -> int:
        """Nodes with engines on them."""
        return {"none": 0, "own nodes": self.launch.engine_nodes, "trainer's nodes": self.launch.nodes}[
            self.engine_place
        ]

    @property
    def first_engine_node(self) -> int:
        return self.launch.nodes if self.engine_place == "own nodes" else 0

    @property
    def num_engines(self) -> int:
        return self.engine_nodes * self.engines_per_node

    @property
    def total_nodes(self) -> int:
        return self.launch.nodes + (self.launch.engine_nodes if self.engine_place == "own nodes" else 0)

    @property
    def world_size(self) -> int:
        """Trainer ranks that will be started."""
        return self.launch.nodes * self.launch.ranks

    @property
    def folder(self) -> Path:
        """Script and record of the job, inside the run folder."""
        return RunFolder.of(self.config).launch

    @property
    def python(self) -> str:
        """The interpreter on the nodes."""
        if self.launch.python is not None:
            return str(self.launch.python)
        return "python3" if self.launch.container else sys.executable

    @property
    def summary(self) -> str:
        """One line for a person."""
        ranks = f"{self.world_size} ranks on {_count(self.launch.nodes, 'node')}"
        engines = {
            "none": "no engine of its own",
            "own nodes": f"{_count(self.num_engines, 'engine')} on {_count(self.engine_nodes, 'node')} more",
            "trainer's nodes": f"{_count(self.num_engines, 'engine')} on the same",
        }
        return f"{ranks}, {engines[self.engine_place]}"

    @property
    def kubernetes_name(self) -> str:
        """The run's name as Kubernetes takes names."""
        return re.sub(r"[^a-z0-9-]+", "-", self.config.name.lower()).strip("-")

    def kubernetes_replicas(self) -> list[tuple[str, int]]:
        """Roles of a PyTorchJob that have pods; the master is one of the nodes."""
        return [("Master", 1)] + ([("Worker", self.launch.nodes - 1)] if self.launch.nodes > 1 else [])

    def run_configs(self) -> list[Config]:
        """The configuration of every run: one, or one a seed with a name of its own."""
        if not self.seeds:
            return [self.config]
        name = self.config.name
        return [self.config.model_copy(update={"seed": seed, "name": f"{name}-seed{seed}"}) for seed in self.seeds]

    def environment(self) -> dict[str, str]:
        """Variables of every rank and engine; those of `launch.env` win."""
        env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.launch.gpus_per_node:
            env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # megatron's overlap of communication relies on it
        else:
            env |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # compiling costs more there than it saves
        return env | {name: str(value) for name, value in self.launch.env.items()}

    def mounts(self) -> list[str]:
        """Mounts of the container, the working folder among them."""
        return [f"{self.workdir}:{self.workdir}", *self.launch.mounts]

    def host_path(self, path: Path) -> Path | None:
        """Where a path that the ranks see lies outside the container; None: in the image, or nowhere."""
        path = path if path.is_absolute() else self.workdir / path
        if self.launch.container is None:
            return path
        for mount in reversed(self.mounts()):
            source, destination, *_ = mount.split(":")
            if path.is_relative_to(destination):
                return Path(source) / path.relative_to(destination)
        return None


def needs_own_engine(config: Config) -> bool:
    """True when the run starts SGLang itself."""
    engine = config.engine
    return not (engine.urls or engine.router or engine.rendezvous) and config.rollout.replay is None


def quoted(value: object) -> str:
    """For a shell."""
    return shlex.quote(str(value))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
