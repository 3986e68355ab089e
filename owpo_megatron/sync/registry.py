"""From the configuration to a WeightSync."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from owpo_megatron.config import SyncConfig
from owpo_megatron.sync.disk import DiskTransport
from owpo_megatron.sync.distributed import DistributedTransport
from owpo_megatron.sync.push import EngineSync, Transport, WeightEngine
from owpo_megatron.sync.tensor import TensorTransport

TRANSPORTS: dict[str, Callable[[Path], Transport]] = {
    "tensor": lambda scratch_dir: TensorTransport(),
    "distributed": lambda scratch_dir: DistributedTransport(),
    "disk": DiskTransport,
}


def make_sync(config: SyncConfig, engines: Sequence[WeightEngine], scratch_dir: Path) -> EngineSync:
    """The configured sync to these engines (`Fleet.clients`); `scratch_dir` is used by the disk transport only."""
    return EngineSync(TRANSPORTS[config.transport](scratch_dir), engines, config.bucket_mb << 20)
