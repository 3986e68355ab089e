"""Memory that only an optimizer step needs, away from the device while engines use it.

Gradients are dropped: each update begins with zeros. The optimizer's moments and masters are copied to host memory, bit
for bit; parameters stay, since engines get them and log-probs need them. Not run on a GPU: on a CPU, where the tests
are, the copies are in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.optimizer import distributed_optimizers

_SMALL = 1 << 10  # bytes: step counts stay


class RestingMemory:
    """Gradients and optimizer state of one rank: on the device, or at rest."""

    def __init__(self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer):
        self._chunks, self._optimizer = chunks, optimizer
        self._away: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._host: dict[int, torch.Tensor] = {}  # pinned memory, kept: pinning takes longer than the copy

    @property
    def resting(self) -> bool:
        return self._away is not None

    @torch.no_grad()
    def rest(self) -> None:
        """Free the device's memory; between steps only."""
        if self.resting:
            return
        self._away = []
        for tensor in _kept(self._optimizer):
            host = self._host.get(id(tensor))
            if host is None or host.shape != tensor.shape:
                host = torch.empty_like(tensor, device="cpu", pin_memory=not cpu.on_cpu())
                self._host[id(tensor)] = host
            host.copy_(tensor)
            self._away.append((tensor, host))
            tensor.untyped_storage().resize_(0)
        for buffer in self._buffers():
            buffer.offload_to_cpu(move_params=False, move_grads=True)
        if not cpu.on_cpu():
            torch.cuda.empty_cache()  # to the device: engines are other processes

    @torch.no_grad()
    def wake(self) -> None:
        """Bring everything back; gradients are zero."""
        if self._away is None:
            return
        for tensor, host in self._away:
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.copy_(host)
        for buffer in self._buffers():
            buffer.reload_from_cpu(move_params=False, move_grads=True)
        self._away = None

    def _buffers(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from (*chunk.buffers, *chunk.expert_parallel_buffers)


def _kept(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Moments, and masters of weights below float32; those in float32 are the parameters themselves."""
    for one in distributed_optimizers(optimizer):
        masters = [shard for group in one.shard_fp32_from_float16_groups for shard in group]
        moments = [value for state in one.optimizer.state.values() for value in state.values()]
        for tensor in (*masters, *moments):
            if not isinstance(tensor, torch.Tensor) or tensor.nbytes < _SMALL:
                continue
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, (
                "the optimizer's tensors have memory of their own"
            )
            yield tensor
