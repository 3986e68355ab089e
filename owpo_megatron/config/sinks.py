"""The sections `sinks:` and `profile:`: where metrics go besides metrics.jsonl, and which steps are profiled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from owpo_megatron.config.file import Section


class SinksConfig(Section):
    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that get every step's and evaluation's numbers. One that fails is reported once, and the run continues.
    docs/sinks.md"""
    project: str = Field("owpo", min_length=1)
    """Project of wandb and trackio, experiment of mlflow."""
    wandb: dict[str, Any] = {}
    """Arguments of wandb.init, e.g. `{mode: offline, entity: my-team}`."""
    mlflow: dict[str, Any] = {}
    """`tracking_uri` (default: a file store, mlruns/ in runs_dir) and `tags`."""
    trackio: dict[str, Any] = {}
    """Arguments of trackio.init, e.g. `{space_id: me/my-space}`."""


class ProfileConfig(Section):
    steps: list[Annotated[int, Field(gt=0)]] = []
    """Steps to profile with torch.profiler, e.g. [5, 6]: a trace per rank and step in profile/ of the run folder, for
    chrome://tracing or Perfetto. Profiled steps are slower."""
    memory: bool = False
    """Record the CUDA allocator during these steps, too, and write a snapshot per rank for PyTorch's memory viewer."""
    ranks: list[Annotated[int, Field(ge=0)]] = [0]
    """Ranks that are profiled."""
