"""Transport through a folder of safetensors files that the engines see under the same path."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

from owpo_megatron.sync.bucket import Bucket
from owpo_megatron.sync.push import WeightEngine, on_all


class DiskTransport:
    """Works wherever trainer and engines share a file system.

    An update's folder appears atomically (written under another name, then renamed) and is removed when the engines
    have read it. SGLang answers as soon as its first tensor-parallel rank has read it, so with several ranks the folder
    stays until the next update.

    Args:
        scratch_dir: parent of the folders; no other run may use it.
    """

    max_bucket_bytes: int | None = None

    def __init__(self, scratch_dir: Path):
        self._scratch_dir = scratch_dir.absolute()
        self._folders: list[Path] | None = (
            None  # folders that engines may read; None: not yet cleared of a killed run's
        )
        self.written_bytes = 0
        """Bytes that the last update wrote."""

    @contextmanager
    def session(self, engines: Sequence[WeightEngine], version: int) -> Iterator[Callable[[Bucket], None]]:
        if self._folders is None:
            self._folders = [*self._scratch_dir.glob("weights_*"), *self._scratch_dir.glob(".weights_*")]
            self._keep(0)
        several_ranks = any(engine.tp_size > 1 for engine in engines)
        # a unique name: no file system can have stale attributes cached for it
        final = self._scratch_dir / f"weights_{version}_{uuid.uuid4().hex[:8]}"
        partial = final.with_name(f".{final.name}.partial")
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
            self._folders.append(final)
            on_all(engines, lambda engine: engine.update_from_disk(str(final)))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            self._keep(1 if several_ranks else 0)

    def close(self) -> None:
        self._keep(0)

    def _keep(self, newest: int) -> None:
        folders = self._folders or []
        while len(folders) > newest:
            shutil.rmtree(folders.pop(0), ignore_errors=True)
