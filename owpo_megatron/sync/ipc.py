"""Transport for colocated engines: the request carries a CUDA IPC handle, the engine copies on the GPU.

The bytes never leave the device. Not run on a GPU yet; written against torch 2.13's reductions and SGLang 0.5.21:

- SGLang's `flattened_bucket` is one tensor of bytes and a description of its parts: one handle for a bucket, not for
  each tensor. It unpickles with `rebuild_cuda_tensor`, patched to take a device's UUID in place of torch's index, since
  CUDA_VISIBLE_DEVICES of trainer and engine may differ.
- A handle counts its readers, so every tensor-parallel rank gets a payload of its own and opens no other.
- torch hangs the record of each handle on the memory it is for, as a chain that ends with the memory: so the buffers
  are freed after each update.
- torch synchronises the reader's stream before it releases a handle, and SGLang drops the tensors before it answers:
  once the answer has arrived, the copies are done and the bucket may be refilled.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing import reductions

from owpo_megatron.sync.bucket import Bucket, Outbox, Staged, on_device
from owpo_megatron.sync.push import UpdateRequests, WeightEngine, on_all

_DEVICE = 6  # position of the device index among the arguments of rebuild_cuda_tensor


class IpcTransport(UpdateRequests):
    """POST /update_weights_from_tensor with handles to a bucket on the trainer's GPU; for engines on the same node."""

    max_bucket_bytes: int | None = None

    def __init__(self) -> None:
        self._outbox = Outbox(on_device)

    @contextmanager
    def sending(self, engines: Sequence[WeightEngine]) -> Iterator[Callable[[Bucket], None]]:
        try:
            with self._outbox.open(lambda staged: by_handles(engines, staged)) as delivery:
                yield delivery.put
        finally:
            self.close()

    def close(self) -> None:
        self._outbox.close()
        torch.cuda.ipc_collect()


def by_handles(engines: Sequence[WeightEngine], staged: Staged) -> None:
    """Let engines of this node load a bucket from this process's GPU."""
    assert staged.flat.is_cuda, "IPC handles need CUDA memory; check_sync refuses this transport elsewhere"
    on_all(engines, lambda engine: engine.update_from_bucket([handles(staged) for _ in range(engine.tp_size)]))


class _Shared:
    """Pickles as CUDA memory of the process that pickled it."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])


@dataclass(frozen=True)
class FlattenedTensorMetadata:
    """A part of a bucket: the fields of SGLang's class of this name, as which it is unpickled."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int  # bytes
    end_idx: int
    numel: int  # bytes, too


_THEIRS = "sglang.srt.weight_sync.tensor_bucket"


def handles(staged: Staged) -> bytes:
    """Pickle a bucket's handle for one reader, with a description of its parts."""
    parts = []
    for where in staged.slices:
        shape = torch.Size(where.shape)
        size = where.dtype.itemsize * shape.numel()
        parts.append(FlattenedTensorMetadata(where.name, shape, where.dtype, where.offset, where.offset + size, size))
    bucket = {"flattened_tensor": _Shared(staged.flat), "metadata": parts}
    # Protocol 3 writes a class as text, module and name: SGLang is not installed here, and its class need not be.
    ours, theirs = (f"c{module}\nFlattenedTensorMetadata\n".encode() for module in (__name__, _THEIRS))
    return pickle.dumps(bucket, protocol=3).replace(ours, theirs)
