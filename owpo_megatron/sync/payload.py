"""Payload of an update by tensors: a pickle of [(name, tensor), ...] that SGLang's restricted unpickler accepts.

All tensors of a bucket are views of one storage, which is pickled first and only once:

- by value: its bytes. Works for every engine, but they are copied about ten times.
- by reference: the name of shared memory, as in torch's multiprocessing with the file_system strategy. The default
  strategy, file descriptors, needs a secret that the engine does not have and would crash it.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch.multiprocessing import reductions

from owpo_megatron.sync.bucket import Slice, Staged


class _View:
    """Pickles as a tensor that is a view of a storage."""

    def __init__(self, storage: object, where: Slice):
        self._storage, self._where = storage, where

    def __reduce__(self) -> tuple[Any, ...]:
        where = self._where
        stride = torch.empty(where.shape, device="meta").stride()
        place = (self._storage, where.offset // where.dtype.itemsize, torch.Size(where.shape), stride)
        return torch._utils._rebuild_tensor_v3, (*place, False, OrderedDict(), where.dtype)


class _SharedStorage:
    """Pickles as the name of shared memory, and counts one reader: the one that the pickle is for."""

    def __init__(self, storage: torch.UntypedStorage):
        self._storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        manager, handle, size = self._storage._share_filename_cpu_()
        self._storage._shared_incref()
        return reductions.rebuild_storage_filename, (torch.UntypedStorage, manager, handle, size, torch.uint8)


def by_value(staged: Staged) -> bytes:
    """Pickle a bucket with its bytes inside; peak memory is twice the bucket, the pickle included.

    Args:
        staged: a bucket on the host.
    """
    exact = staged.flat.clone().untyped_storage()  # the buffer behind may be larger
    return _pickled(torch.storage.TypedStorage(wrap_storage=exact, dtype=torch.uint8, _internal=True), staged)


def by_reference(staged: Staged) -> bytes:
    """Pickle a bucket for one reader, a few hundred bytes per tensor. It must not change until the reader is done.

    Args:
        staged: a bucket at the start of memory from `shared_memory`.
    """
    assert staged.flat.storage_offset() == 0
    return _pickled(_SharedStorage(staged.flat.untyped_storage()), staged)


def shared_memory(size: int) -> torch.Tensor:
    """Allocate [size] uint8 in shared memory that other processes of this machine can open by name.

    torch starts one small process (torch_shm_manager) that frees the memory when all its users have exited.
    """
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_using_filename_cpu(size))


def _pickled(storage: object, staged: Staged) -> bytes:
    return pickle.dumps([(where.name, _View(storage, where)) for where in staged.slices], protocol=5)
