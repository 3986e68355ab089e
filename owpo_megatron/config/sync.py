"""Section `sync:`: how weights reach the engines, and how that is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError


class SyncConfig(Section):
    transport: Literal["tensor", "distributed", "disk", "ipc"] = "tensor"
    """How weights reach the engines. `tensor`: in the request, or by shared memory to the run's own engines;
    `distributed`: broadcast over NCCL or gloo; `disk`: safetensors in a folder that the engines see; `ipc`: CUDA
    handles, for engines on the trainer's GPUs."""
    bucket_mb: int = Field(512, gt=0)
    """Largest bucket of weights in MB; up to three buckets are in memory at a time."""
    folder: Path | None = None
    """With `disk`: a folder that every engine sees under the same path and that no other run uses; null: sync/ in the
    run folder."""
    delta: bool = False
    """With `disk`: write only the elements that changed since the last update (few in bfloat16, nearly all in float32).
    For the run's own engines and those of `engine.rendezvous`."""
    mirror: Path = Path("/dev/shm")
    """With `delta`: directory for a full copy of the weights, on the trainer and next to every remote engine. Use a
    tmpfs; every update dirties almost every page."""
    fp8: bool = False
    """Quantise linear weights before sending them (e4m3, 128 x 128 blocks) and start own engines to match. CUDA
    only."""
    verify: Literal["off", "hash", "logprob"] = "off"
    """Check of the delivered weights after every update. `hash`: every tensor of every engine; `logprob`: short samples
    of every engine, recomputed by the trainer."""
    tolerance: float | None = Field(None, gt=0)
    """Largest mean |difference| with `verify: logprob`; null: 1e-4 for float32, 0.05 for bfloat16, 0.2 with fp8."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> SyncConfig:
        if self.delta and self.transport != "disk":
            raise UserError("sync.delta", True, f"only transport disk supports it, not {self.transport}; set it false")
        if self.fp8 and self.verify == "hash":
            raise UserError("sync.verify", "hash", "engines hash quantised weights differently; use logprob")
        return self
