"""The doctor's scope and its findings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from owpo_megatron.config import Config

Status = Literal["ok", "warn", "fail"]
BackendName = Literal["auto", "gloo", "nccl"]


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table.

    Example:
        Finding("disk", "warn", "7.1 GB free", "a run keeps checkpoints: free some space, or set runs_dir elsewhere")
    """

    what: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Scope:
    """The scope of the checks: this machine, or what one run needs of it and of the others.

    Example:
        Scope(Config.load("run.yaml"), nodes=2, reach_nodes=True, backend="nccl")
    """

    config: Config | None = None
    nodes: int = 1  # that the run spreads over
    reach_nodes: bool = False  # start ranks on all of them, by srun; else on this machine alone
    backend: BackendName = "auto"  # which collectives are tried; auto: NCCL where torch sees CUDA, else gloo

    @property
    def runs_dir(self) -> Path:
        return self.config.runs_dir if self.config else Path("runs")

    @property
    def world_size(self) -> int:
        """Ranks of the trainer; two stand for a run that is not known."""
        return self.config.parallel.world_size if self.config else 2
