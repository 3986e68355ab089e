"""Transport for colocated engines: the request carries CUDA IPC handles, the engine copies on the GPU.

The bytes never leave the device. Not run on a GPU yet; written against torch 2.13's reductions and SGLang 0.5.21:

- SGLang unpickles `[(name, tensor), ...]` with `rebuild_cuda_tensor`, patched to take a device's UUID in place of
  torch's index, since CUDA_VISIBLE_DEVICES of trainer and engine may differ.
- A handle counts its readers, so every tensor-parallel rank gets a payload of its own and opens no other.
- torch synchronises the reader's stream before it releases a handle, and SGLang drops the tensors before it answers:
  once the answer has arrived, the copies are done and the bucket may be refilled.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing import reductions

from owpo_megatron.sync.bucket import Bucket, Outbox, Slice, Staged, on_device
from owpo_megatron.sync.push import WeightEngine, on_all

_DEVICE = 6  # position of the device index among the arguments of rebuild_cuda_tensor


class IpcTransport:
    """POST /update_weights_from_tensor with handles to a bucket on the trainer's GPU; for engines on the same node."""

    max_bucket_bytes: int | None = None

    def __init__(self) -> None:
        self._outbox = Outbox(on_device)

    @contextmanager
    def session(self, engines: Sequence[WeightEngine], version: int) -> Iterator[Callable[[Bucket], None]]:
        def deliver(staged: Staged) -> None:
            assert staged.flat.is_cuda, "IPC handles need CUDA memory; check_sync refuses this transport elsewhere"
            on_all(engines, lambda engine: engine.update_from_tensor([handles(staged) for _ in range(engine.tp_size)]))

        on_all(engines, lambda engine: engine.begin_update())
        with self._outbox.open(deliver) as delivery:
            yield delivery.put
        on_all(engines, lambda engine: engine.end_update())

    def close(self) -> None:
        self._outbox.close()
        torch.cuda.ipc_collect()


class _Shared:
    """Pickles as a tensor that is a view of CUDA memory of the process that pickled it."""

    def __init__(self, flat: torch.Tensor, where: Slice):
        size = where.dtype.itemsize * torch.Size(where.shape).numel()
        self._tensor = flat[where.offset : where.offset + size].view(where.dtype).view(where.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
        return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])


def handles(staged: Staged) -> bytes:
    """Pickle a bucket's handles for one reader: a few hundred bytes per tensor."""
    return pickle.dumps([(where.name, _Shared(staged.flat, where)) for where in staged.slices], protocol=5)
