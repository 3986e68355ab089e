"""Weights through a folder of safetensors files that the engines see under the same path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from owpo_megatron.sync.bucket import Bucket
from owpo_megatron.sync.push import WeightEngine, on_all


class DiskTransport:
    """Works wherever trainer and engines share a file system. The folder appears whole (written aside, then renamed)
    and goes when the engines have read it.

    Args:
        scratch_dir: where the folders are made.
    """

    max_bucket_bytes: int | None = None

    def __init__(self, scratch_dir: Path):
        self._scratch_dir = scratch_dir.absolute()
        self.written_bytes = 0
        """Of the last update."""

    @contextmanager
    def session(self, engines: Sequence[WeightEngine], version: int) -> Iterator[Callable[[Bucket], None]]:
        final = self._scratch_dir / f"weights_{version}"
        partial = self._scratch_dir / f".weights_{version}.partial"
        for leftover in (final, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        shard_of: dict[str, str] = {}
        self.written_bytes = 0

        def write(bucket: Bucket) -> None:
            shard = f"model-{len(set(shard_of.values())) + 1:05d}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in bucket}, partial / shard)
            shard_of.update((name, shard) for name, _ in bucket)
            self.written_bytes += sum(tensor.nbytes for _, tensor in bucket)

        try:
            yield write
            index = {"metadata": {"total_size": self.written_bytes}, "weight_map": shard_of}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index))
            partial.rename(final)
            on_all(engines, lambda engine: engine.update_from_disk(str(final)))
        finally:
            for folder in (final, partial):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        pass
