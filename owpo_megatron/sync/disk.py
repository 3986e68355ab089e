"""Weights through a folder of safetensors files that the engines see under the same path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from owpo_megatron.sync.push import Bucket, WeightEngine, on_all


class DiskTransport:
    """Works wherever trainer and engines share a file system. The folder appears whole (written aside, then renamed)
    and goes when the engines have read it.

    Args:
        scratch_dir: where the folders are made.
    """

    def __init__(self, scratch_dir: Path):
        self._scratch_dir = scratch_dir.absolute()

    def begin(self, engines: Sequence[WeightEngine], version: int) -> None:
        self._final = self._scratch_dir / f"weights_{version}"
        self._partial = self._scratch_dir / f".weights_{version}.partial"
        for leftover in (self._final, self._partial):
            shutil.rmtree(leftover, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._shard_of: dict[str, str] = {}
        self._bytes = 0
        self._shards = 0

    def send(self, engines: Sequence[WeightEngine], bucket: Bucket) -> None:
        self._shards += 1
        shard = f"model-{self._shards:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in bucket}, self._partial / shard)
        self._shard_of |= {name: shard for name, _ in bucket}
        self._bytes += sum(tensor.nbytes for _, tensor in bucket)

    def end(self, engines: Sequence[WeightEngine]) -> None:
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._shard_of}
        (self._partial / "model.safetensors.index.json").write_text(json.dumps(index))
        self._partial.rename(self._final)
        on_all(engines, lambda engine: engine.update_from_disk(str(self._final)))
        shutil.rmtree(self._final)

    def close(self) -> None:
        pass
