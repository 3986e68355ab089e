"""A job as requested from a cluster, derived from the configuration, independent of how it is submitted."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from owpo_megatron.config import Config
from owpo_megatron.config.launch import LaunchConfig
from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import RunFolder

EnginePlace = Literal["none", "own nodes", "trainer's nodes"]

NCCL_WATCH = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # end the process on an error of a collective, without cleaning up
    "TORCH_NCCL_ENABLE_MONITORING": "1",  # end it when NCCL's watchdog itself is stuck ...
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600",  # ... for this long
    "TORCH_FR_BUFFER_SIZE": "2000",  # flight recorder: the last collectives of each rank ...
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # ... written to the logs when one times out
}
"""Defaults that turn a hang of NCCL into an error with a trace, for torchrun to end the job and Slurm to requeue it."""


@dataclass(frozen=True)
class Job:
    """Nodes, roles and folders of a run on a cluster. Trainer nodes come first, engine nodes after them.

    Example:
        Job(Config.load("run.yaml"), workdir=Path.cwd()).total_nodes
    """

    config: Config
    workdir: Path
    """The job's working folder, shared by all nodes; relative paths of the configuration start here."""
    seeds: tuple[int, ...] = ()
    """One run per seed, as a job array; each in its own folder."""
    links: int = 1
    """Jobs in a row, each resuming where the previous one stopped."""

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
        """Number of engines that a node's GPUs allow; one on a cluster without GPUs."""
        return max(1, self.launch.gpus_per_node // self.config.engine.tp)

    @property
    def engine_nodes(self) -> int:
        """Number of nodes that run engines."""
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
        """Number of trainer ranks."""
        return self.launch.nodes * self.launch.ranks

    @property
    def folder(self) -> Path:
        """Script and record of the job, inside the run folder."""
        return RunFolder.of(self.config).launch

    @property
    def python(self) -> str:
        """The trainer's interpreter on the nodes."""
        if self.launch.python is not None:
            return str(self.launch.python)
        return "python3" if self.launch.container else sys.executable

    @property
    def summary(self) -> str:
        """One line for people."""
        ranks = f"{self.world_size} ranks on {_count(self.launch.nodes, 'node')}"
        engines = {
            "none": "no engine of its own",
            "own nodes": f"{_count(self.num_engines, 'engine')} on {_count(self.engine_nodes, 'more node')}",
            "trainer's nodes": f"{_count(self.num_engines, 'engine')} on the same",
        }
        return f"{ranks}, {engines[self.engine_place]}"

    @property
    def kubernetes_name(self) -> str:
        """The run's name as a valid Kubernetes name."""
        return re.sub(r"[^a-z0-9-]+", "-", self.config.name.lower()).strip("-")

    def kubernetes_replicas(self) -> list[tuple[str, int]]:
        """Roles of a PyTorchJob that have pods; the master is one of the nodes."""
        return [("Master", 1)] + ([("Worker", self.launch.nodes - 1)] if self.launch.nodes > 1 else [])

    def run_configs(self) -> list[Config]:
        """The configuration of every run: one, or one per seed with its own name."""
        if not self.seeds:
            return [self.config]
        name = self.config.name
        return [self.config.model_copy(update={"seed": seed, "name": f"{name}-seed{seed}"}) for seed in self.seeds]

    def environment(self) -> dict[str, str]:
        """Environment of every rank and engine; `launch.env` wins."""
        env = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.launch.gpus_per_node:
            env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # megatron's overlap of communication relies on it
            env |= NCCL_WATCH
            if self.config.sync.transport == "distributed":
                env["NCCL_CUMEM_ENABLE"] = "0"  # as SGLang sets it in its engines: both ends of a group must agree
        else:
            env |= {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}  # compiling costs more there than it saves
        return env | {name: str(value) for name, value in self.launch.env.items()}

    def mounts(self) -> list[str]:
        """Mounts of the container, including the working folder."""
        return [f"{self.workdir}:{self.workdir}", *self.launch.mounts]

    def host_path(self, path: Path) -> Path | None:
        """A path of the ranks as seen outside the container; None: it is inside the image, or nowhere."""
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
    return config.engine.starts_servers and config.rollout.replay is None


def quoted(value: object) -> str:
    """Quoted for a shell."""
    return shlex.quote(str(value))


def kubernetes_image(image: str) -> str:
    """The image as Kubernetes writes it: enroot's `REGISTRY#NAME:TAG` is `REGISTRY/NAME:TAG` there.

    Raises:
        UserError: it is a file, which pods cannot use.
    """
    if is_image_file(image):
        raise UserError("launch.container", image, "is a file; pods need an image in a registry: REGISTRY/NAME:TAG")
    return image.removeprefix("docker://").replace("#", "/", 1)


def is_image_file(image: str) -> bool:
    """Whether a container image is a path on the nodes rather than a name in a registry."""
    return image.startswith(("/", "./")) or image.endswith((".sif", ".sqsh"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
