"""Weights through a folder of safetensors files that the engines see under the same path."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from owpo_megatron.sync.bucket import Bucket
from owpo_megatron.sync.push import WeightEngine, on_all


class DiskTransport:
    """Works wherever trainer and engines share a file system. The folder appears whole (written aside, then renamed)
    and goes when the engines have read it.

    Args:
        scratch_dir: where the folders are made.
        delta: leave out tensors whose bytes have not changed since the update before, for engines that have had it.
    """

    max_bucket_bytes: int | None = None

    def __init__(self, scratch_dir: Path, delta: bool = False):
        self._scratch_dir = scratch_dir.absolute()
        self._delta = delta
        self._had: dict[str, bytes] = {}  # name -> hash of what all of `_holders` have
        self._holders: list[tuple[str, int]] = []
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
        holders = [(engine.url, engine.incarnation) for engine in engines]
        # An engine that was restarted, or an update that went wrong: everything is sent.
        had = self._had if self._delta and holders == self._holders else {}
        self._had, self._holders, self.written_bytes = {}, [], 0
        now: dict[str, bytes] = {}

        def write(bucket: Bucket) -> None:
            if self._delta:
                now.update((name, _digest(tensor)) for name, tensor in bucket)
                bucket = [(name, tensor) for name, tensor in bucket if had.get(name) != now[name]]
            if bucket:
                shard = f"model-{len(set(shard_of.values())) + 1:05d}.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in bucket}, partial / shard)
                shard_of.update((name, shard) for name, _ in bucket)
                self.written_bytes += sum(tensor.nbytes for _, tensor in bucket)

        try:
            yield write
            if shard_of:
                index = {"metadata": {"total_size": self.written_bytes}, "weight_map": shard_of}
                (partial / "model.safetensors.index.json").write_text(json.dumps(index))
                partial.rename(final)
                on_all(engines, lambda engine: engine.update_from_disk(str(final)))
            self._had, self._holders = now, holders
        finally:
            for folder in (final, partial):
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        pass


def _digest(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data).digest()
