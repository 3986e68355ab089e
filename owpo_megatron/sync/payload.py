"""What an update by tensors carries: a pickle of [(name, tensor), ...] that SGLang's restricted unpickler accepts.

All tensors of a bucket are views of one storage, which comes first and once:

- by value: its bytes. Fit for every engine; they are copied about ten times on their way.
- by reference: the name of shared memory, as torch's own multiprocessing has it with the file_system strategy. Its
  default, file descriptors, would ask the engine for a secret that it does not have, and the engine would die of it.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch.multiprocessing import reductions

from owpo_megatron.sync.bucket import Slice, Staged


class _View:
    """Pickles as a tensor that looks into a storage."""

    def __init__(self, storage: object, where: Slice):
        self._storage, self._where = storage, where

    def __reduce__(self) -> tuple[Any, ...]:
        where = self._where
        stride = torch.empty(where.shape, device="meta").stride()
        place = (self._storage, where.offset // where.dtype.itemsize, torch.Size(where.shape), stride)
        return torch._utils._rebuild_tensor_v3, (*place, False, OrderedDict(), where.dtype)


class _SharedStorage:
    """Pickles as the name of shared memory; counts the one reader that the pickle is for."""

    def __init__(self, storage: torch.UntypedStorage):
        self._storage = storage

    def __reduce__(self) -> tuple[Any, ...]:
        manager, handle, size = self._storage._share_filename_cpu_()
        self._storage._shared_incref()
        return reductions.rebuild_storage_filename, (torch.UntypedStorage, manager, handle, size, torch.uint8)


def by_value(staged: Staged) -> bytes:
    """The pickle with the bucket's bytes inside; it needs twice the bucket while it is made, itself included.

    Args:
        staged: a bucket on the host.
    """
    exact = staged.flat.clone().untyped_storage()  # the buffer behind may be larger
    return _pickled(torch.storage.TypedStorage(wrap_storage=exact, dtype=torch.uint8, _internal=True), staged)


def by_reference(staged: Staged) -> bytes:
    """The pickle for one reader: some hundred bytes a tensor. The bucket must stay as it is until the reader is done.

    Args:
        staged: a bucket in memory of `shared_memory`, at the start of it.
    """
    assert staged.flat.storage_offset() == 0
    return _pickled(_SharedStorage(staged.flat.untyped_storage()), staged)


def shared_memory(size: int) -> torch.Tensor:
    """[size] uint8 in shared memory that a process of this machine can open by name.

    torch starts one small process (torch_shm_manager) that removes the memory when everyone who used it has ended.
    """
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_using_filename_cpu(size))


def _pickled(storage: object, staged: Staged) -> bytes:
    return pickle.dumps([(where.name, _View(storage, where)) for where in staged.slices], protocol=5)
