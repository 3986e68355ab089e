"""Memory that only an optimizer step needs, away from the device at other times.

                          gradients             moments, masters below float32
    engine.in_turn        away while engines    away while engines use the GPU
                          use the GPU
    optimizer.offload                           on the device during steps and checkpoints alone

Gradients are dropped: each update begins with zeros. The optimizer's state is copied to host memory and back, bit for
bit; parameters stay, since engines get them and log-probs need them. Not run on a GPU: on a CPU, where the tests are,
the copies are in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.optimizer import distributed_optimizers

_SMALL = 1 << 10  # bytes: step counts stay


class RestingState:
    """Optimizer state of one rank: on the device, or at rest in host memory."""

    def __init__(self, optimizer: MegatronOptimizer):
        self._optimizer = optimizer
        self._away: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self._host: dict[int, torch.Tensor] = {}  # pinned memory, kept: pinning takes longer than the copy

    @property
    def bytes_away(self) -> int:
        return sum(host.nbytes for _, host in self._away or ())

    @torch.no_grad()
    def rest(self) -> None:
        """Free the device's memory."""
        if self._away is not None:
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

    @torch.no_grad()
    def wake(self) -> None:
        """Bring it back."""
        for tensor, host in self._away or ():
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.copy_(host)
        self._away = None


class RestingMemory:
    """Gradients and optimizer state of one rank.

    Args:
        offload: the state is on the device only where `with_state` is entered.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, offload: bool = False):
        self._chunks, self._offload = chunks, offload
        self.state = RestingState(optimizer)
        self.resting = False
        """Whether gradients and state have left the device for another's sake."""
        if offload:
            self.state.rest()

    @torch.no_grad()
    def rest(self) -> None:
        """Free the device's memory for engines; between steps only."""
        if self.resting:
            return
        self.resting = True
        self.state.rest()
        for buffer in self._buffers():
            buffer.offload_to_cpu(move_params=False, move_grads=True)
        if not cpu.on_cpu():
            torch.cuda.empty_cache()  # to the device: engines are other processes

    @torch.no_grad()
    def wake(self) -> None:
        """Bring back what a backward needs: gradients, which are zero, and the state unless it is offloaded."""
        if not self.resting:
            return
        self.resting = False
        if not self._offload:
            self.state.wake()
        for buffer in self._buffers():
            buffer.reload_from_cpu(move_params=False, move_grads=True)

    @contextmanager
    def with_state(self) -> Iterator[None]:
        """A block that reads or changes the optimizer's state."""
        self.wake()
        self.state.wake()
        yield
        if self._offload:
            self.state.rest()

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
