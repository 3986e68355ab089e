"""The `launch:` section: how `owpo launch` asks a cluster for a run. Its flags override these fields."""

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
    """GPUs asked for on every node; 0: a cluster without GPUs, where ranks talk over gloo."""
    ranks_per_node: int | None = Field(None, gt=0)
    """Trainer ranks on a node; None: one a GPU, or one where there are no GPUs."""
    engine_nodes: int = Field(0, ge=0)
    """Nodes for SGLang beside the trainer's; 0: engines run on the trainer's nodes, sharing their GPUs."""
    time: Time | None = None
    """Time limit of one attempt; None: the partition's."""
    account: str | None = None
    partition: str | None = None
    exclusive: bool = True
    """Whole nodes with all their cores and memory; False: say in `sbatch` how much of them."""
    sbatch: list[str] = []
    """Further options of sbatch, each as it stands behind #SBATCH, e.g. `--constraint=h100`."""
    container: str | None = None
    """Image, or an enroot or .sif file; None: the nodes' own Python."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: list[str] = []
    """Folders seen inside the container, SOURCE:DESTINATION or SOURCE:DESTINATION:ro; the working folder always is."""
    env: dict[str, str | int | float] = {}
    """Variables of every rank and engine: NCCL_SOCKET_IFNAME, NCCL_IB_HCA, HF_HOME, ..."""
    prologue: list[str] = []
    """Shell lines run on the first node before anything else: `module load cuda/13.0`, ..."""
    python: Path | None = None
    """The trainer's interpreter on the nodes; None: this one, or `python3` inside a container."""
    signal_seconds: int = Field(300, ge=30)
    """This long before the time limit the run is asked to finish its step and save."""
    max_requeues: int = Field(3, ge=0)
    """Times a job goes back into the queue after a failure."""
    max_continuations: int = Field(100, ge=0)
    """Times a job goes back into the queue because its time was over and it had saved; 0: it ends there."""
    nemo_python: Path | None = None
    """Interpreter with NeMo-Run; None: .venv-nemo beside the project (made by `make nemo`)."""

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
                raise UserError("launch.env", name, "not a name that a shell takes")
        return self
