"""This rank's model chunks, with parameters that may still be under way from other ranks after an optimizer step.

A step of the distributed optimizer writes one share of each parameter on each rank that has it, and an all-gather
brings the others. A late gather is started by the step and goes on while the next training pass begins, whose modules
wait for their own parameters in megatron-core's forward pre-hooks. Whoever else takes a chunk, or a slot's buffers
(slots.py), gets whole parameters: `finish` is called there, and nowhere else. megatron-core's own training loop does so
before it evaluates or saves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from megatron.core.distributed import DistributedDataParallel


class Chunks(Sequence[DistributedDataParallel]):
    """Chunks whose parameters are whole for whoever takes one out.

    Args:
        late: the gather after a step may take until the next training pass; else it is over when the step is.
    """

    def __init__(self, chunks: Iterable[DistributedDataParallel], late: bool = False):
        self._chunks = list(chunks)
        self._late = late
        self._under_way = False
        if late:
            self._let_modules_wait(False)

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> DistributedDataParallel: ...
    @overload
    def __getitem__(self, index: slice) -> list[DistributedDataParallel]: ...
    def __getitem__(self, index: int | slice) -> DistributedDataParallel | list[DistributedDataParallel]:
        self.finish()
        return self._chunks[index]

    def start(self) -> None:
        """Start the gather that a step leaves to be done, in the order of the next pass. Collective."""
        if not self._late:
            return
        assert not self._under_way
        self._under_way = True
        for group in self._groups():
            group.start_param_sync()

    def finish(self) -> None:
        """Wait for the gather. Not collective: a rank that reads nothing need not wait."""
        if self._under_way:
            for group in self._groups():
                if group.param_gather_handle is not None:
                    group.start_param_sync(force_sync=True)
            self._under_way = False

    @contextlib.contextmanager
    def in_training(self) -> Iterator[list[DistributedDataParallel]]:
        """Context of a training pass over the chunks that it yields: their modules wait for their own parameters."""
        if not self._under_way:
            yield self._chunks
            return
        self._let_modules_wait(True)
        try:
            yield self._chunks
        finally:
            self._let_modules_wait(False)
        unread = [name for chunk in self._chunks for name in _not_waited_for(chunk)]
        assert not unread, f"the pass may have read old values of {', '.join(unread)}: no module waited for them"
        self._under_way = False

    def _groups(self) -> Iterator[Any]:
        """Buckets in the order of a pass; megatron-core puts the last layers into a chunk's first bucket."""
        for chunk in self._chunks:
            yield from (*reversed(chunk.bucket_groups), *reversed(chunk.expert_parallel_bucket_groups))

    def _let_modules_wait(self, wait: bool) -> None:
        for chunk in self._chunks:
            if wait:
                chunk.enable_forward_pre_hook()
            else:
                chunk.disable_forward_pre_hook(param_sync=False)


def _not_waited_for(chunk: DistributedDataParallel) -> list[str]:
    """The parameters whose gather nobody has waited for."""
    return [
        name
        for name, param in chunk.module.named_parameters()
        if chunk.param_to_bucket_group[param].param_gather_handle is not None
    ]
