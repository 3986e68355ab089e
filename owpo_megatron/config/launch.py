"""The `launch:` section: resources that `owpo launch` requests. Its flags override these fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from owpo_megatron.config.file import Section, written_as
from owpo_megatron.errors import UserError

Time = Annotated[
    str,
    written_as(
        r"^(\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d(:\d\d)?)?)$",
        "write it as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]",
    ),
]


class LaunchConfig(Section):
    nodes: int = Field(1, gt=0)
    """Nodes of the trainer."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs requested on every node; 0: a cluster without GPUs, where ranks communicate over gloo."""
    ranks_per_node: int | None = Field(None, gt=0)
    """Trainer ranks per node; null: one per GPU, or one where there are no GPUs."""
    engine_nodes: int = Field(0, ge=0)
    """Nodes for SGLang, in addition to the trainer's; 0: engines share the trainer's nodes and GPUs."""
    time: Time | None = None
    """Time limit of one attempt; null: the partition's."""
    account: str | None = None
    """Account to charge."""
    partition: str | None = None
    """Partition to submit to."""
    exclusive: bool = True
    """Request whole nodes with all their cores and memory; with false, request a share in `sbatch`."""
    sbatch: list[str] = []
    """Extra sbatch options, written as after #SBATCH, e.g. `--constraint=h100`. They override the script's own."""
    container: str | None = None
    """Image, or an enroot or .sif file; null: the nodes' own Python."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Program that starts containers on the nodes."""
    mounts: list[str] = []
    """Folders to mount, SOURCE:DESTINATION or SOURCE:DESTINATION:ro; the working folder is always mounted."""
    env: dict[str, str | int | float] = {}
    """Environment variables of every rank and engine: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, HF_HOME, ... Those of the
    submitting shell do not reach the job."""
    prologue: list[str] = []
    """Shell lines that the batch script runs first: `module load cuda/13.0`, ..."""
    python: Path | None = None
    """Interpreter of the trainer on the nodes; null: this one, or `python3` inside a container."""
    signal_seconds: int = Field(300, ge=30)
    """Seconds before the time limit at which the run finishes its step and saves."""
    health_check: bool = True
    """Check every node before ranks and engines start: the run folder, the interpreter, /dev/shm, GPUs and their memory
    errors. A node that fails is named, and the job is requeued."""
    max_requeues: int = Field(3, ge=0)
    """Requeues after failures in a row; a new checkpoint between two failures starts the count anew."""
    max_continuations: int = Field(100, ge=0)
    """Requeues after a save at the time limit or at preemption, each resuming from it; 0: the job ends there."""
    nemo_python: Path | None = None
    """Interpreter with NeMo-Run; null: that of .venv-nemo in the clone (`make nemo`)."""

    @property
    def ranks(self) -> int:
        """Trainer ranks on a node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    @model_validator(mode="after")
    def _no_contradictions(self) -> LaunchConfig:
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            raise UserError(
                "launch.ranks_per_node", self.ranks, f"a node has {self.gpus_per_node} GPUs (launch.gpus_per_node)"
            )
        for mount in self.mounts:
            if not 2 <= len(mount.split(":")) <= 3 or "," in mount:
                raise UserError("launch.mounts", mount, "write SOURCE:DESTINATION or SOURCE:DESTINATION:ro")
        for option in self.sbatch:
            if not option.startswith("-"):
                raise UserError("launch.sbatch", option, "write it as sbatch takes it, e.g. --constraint=h100")
        for name in self.env:
            if not name.isidentifier():
                raise UserError("launch.env", name, "is not a valid name of a shell variable")
        return self
