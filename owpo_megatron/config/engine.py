"""Section `engine:`: the SGLang servers of a run, its own or others'."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from owpo_megatron.config.file import Section


class EngineConfig(Section):
    urls: list[str] = []
    """URLs of running SGLang servers; empty: the run starts and stops its own."""
    router: str | None = None
    """URL of an sglang-router: samples go through it, weights go directly to each engine behind it."""
    rendezvous: Path | None = None
    """Folder where engines that others start announce themselves (`owpo serve --rendezvous`, `owpo launch`)."""
    announced: int = Field(1, gt=0)
    """Engines to wait for in `rendezvous`."""
    warm: bool = True
    """Use the engine that `owpo serve -c FILE --warm` keeps for this configuration on this machine, where it is free,
    instead of starting one."""
    python: Path | None = None
    """Interpreter of SGLang's environment; null: the one that `make setup` or `owpo setup-engine` made, else this
    one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the run's own servers; `auto` uses NVIDIA GPUs if there are any."""
    host: str = "127.0.0.1"
    """Address that the run's own servers listen on."""
    port: int = Field(0, ge=0, le=65535)
    """Port of the first server; further servers take the following ones. 0: free ports."""
    tp: int = Field(1, gt=0)
    """Tensor-parallel ranks of each server."""
    count: int = Field(1, gt=0)
    """Servers that the run starts; requests are distributed over them."""
    startup_timeout: float = Field(300.0, gt=0)
    """Seconds to wait for the server's first answer."""
    request_timeout: float = Field(600.0, gt=0)
    """Seconds for one response before its engine counts as hung."""
    max_restarts: int = Field(3, ge=0)
    """Maximum restarts per engine; then the run fails."""
    concurrency: int = Field(256, gt=0)
    """Requests in flight per engine."""
    in_turn: bool = False
    """For engines on the trainer's GPUs: they release weights and cache while the policy trains, and gradients and
    optimizer state leave the GPU while they generate. CUDA only."""

    @property
    def starts_servers(self) -> bool:
        """The run starts servers of its own; no others are named."""
        return not (self.urls or self.router or self.rendezvous)
