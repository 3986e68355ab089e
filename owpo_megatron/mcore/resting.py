"""Memory that only an optimizer step needs: smaller at other times, or away from the device.

                          gradients             moments               masters below float32
    optimizer.moments                           float32 during steps
                                                and checkpoints alone
    optimizer.offload                           on the device during steps and checkpoints alone
    engine.in_turn        away while engines    away while engines use the GPU
                          use the GPU

Gradients are dropped: each update begins with zeros. The optimizer's state is copied to host memory and back, bit for
bit; parameters stay, since engines get them and log-probs need them. Moments in bfloat16 are rounded after each step,
and nowhere else: a checkpoint has the values that the next step begins with, in float32. Whose AdamW makes the step
does not matter. Not run on a GPU: on a CPU, where the tests are, the copies are in the same memory.
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


class RestingState:
    """Optimizer state of one rank: as a step needs it, or at rest.

    Args:
        moments: what Adam's moments are rounded to at rest.
    """

    def __init__(self, optimizer: MegatronOptimizer, moments: torch.dtype = torch.float32):
        self._optimizer, self._moments = optimizer, moments
        self._at_rest: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor without memory, what it held)
        self._away = False  # the second of each pair is in host memory
        self._host: dict[int, torch.Tensor] = {}  # pinned memory, kept: pinning takes longer than the copy

    @property
    def bytes_away(self) -> int:
        """Bytes in host memory."""
        return sum(copy.nbytes for _, copy in self._at_rest) if self._away else 0

    @property
    def bytes_rounded(self) -> int:
        """Bytes on the device, of moments at rest."""
        return 0 if self._away else sum(copy.nbytes for _, copy in self._at_rest)

    @torch.no_grad()
    def rest(self, away: bool) -> None:
        """Free the device's memory, all of it or what rounding frees.

        Args:
            away: keep the state in host memory.
        """
        if self._at_rest and self._away == away:
            return
        self.wake()
        self._away = away
        for tensor, dtype in self._kept():
            if not away and dtype == tensor.dtype:
                continue
            copy = self._host_copy(tensor, dtype) if away else torch.empty_like(tensor, dtype=dtype)
            self._at_rest.append((tensor, copy.copy_(tensor)))
            tensor.untyped_storage().resize_(0)

    @torch.no_grad()
    def wake(self) -> None:
        """Bring it back."""
        while self._at_rest:
            tensor, copy = self._at_rest.pop()
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.copy_(copy)

    def _host_copy(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        host = self._host.get(id(tensor))
        if host is None or host.shape != tensor.shape:
            host = torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=not cpu.on_cpu())
            self._host[id(tensor)] = host
        return host

    def _kept(self) -> Iterator[tuple[torch.Tensor, torch.dtype]]:
        """(tensor, its type at rest): moments, and masters of weights below float32; those in float32 are the
        parameters themselves."""
        for one in distributed_optimizers(self._optimizer):
            masters = [shard for group in one.shard_fp32_from_float16_groups for shard in group]
            states = one.optimizer.state.values()
            moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq") if name in state]
            for tensor in (*masters, *moments):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, "the tensors have memory of their own"
            yield from ((tensor, tensor.dtype) for tensor in masters)
            yield from ((tensor, self._moments) for tensor in moments)


class RestingMemory:
    """Gradients and optimizer state of one rank.

    Args:
        offload: the state is on the device only where `with_state` is entered.
        moments: the type of Adam's moments where it is not.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        offload: bool = False,
        moments: torch.dtype = torch.float32,
    ):
        self._chunks, self._offload = chunks, offload
        self.state = RestingState(optimizer, moments)
        self.resting = False
        """Whether gradients and state have left the device for another's sake."""
        self._settle()

    @torch.no_grad()
    def rest(self) -> None:
        """Free the device's memory for engines; between steps only."""
        if self.resting:
            return
        self.resting = True
        self.state.rest(away=True)
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
        self._settle()
        for buffer in self._buffers():
            buffer.reload_from_cpu(move_params=False, move_grads=True)

    @contextmanager
    def with_state(self) -> Iterator[None]:
        """A block that reads or changes the optimizer's state."""
        self.wake()
        self.state.wake()
        yield
        self._settle()

    def _settle(self) -> None:
        """Put the state where it is between steps; by default it stays as it is."""
        self.state.rest(away=self._offload)

    def _buffers(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from (*chunk.buffers, *chunk.expert_parallel_buffers)
