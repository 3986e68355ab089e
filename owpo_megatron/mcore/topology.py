"""Process groups of tensor, context, pipeline, data and expert parallelism, and this rank's place in them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.launched import started_by_torchrun
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.context import Context

# Other ranks wait in a broadcast while rank 0 generates, for as long as that takes: the watchdog ends a run that hangs
# (trainer/watchdog.py), this limit is for a run without one.
_CONTROL_TIMEOUT = timedelta(days=7)
_CONTROL_TIMEOUT_ALONE = timedelta(hours=2)
# Tensor collectives begin when every rank has its work: a rank that is this late is dead. The watchdog finds it
# earlier, and names it.
_TENSOR_TIMEOUT = timedelta(minutes=30)
_AFTER_THE_WATCHDOG = timedelta(minutes=10)


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates and groups. Ranks are laid out tp fastest, then cp, dp, pp (megatron's default)."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    context: Context
    ep_rank: int  # those with the same one hold the same experts
    ep_size: int
    etp_rank: int  # which part of its experts' matrices a rank has
    etp_size: int
    expert_copy_rank: int  # among the ranks with the same parts of the same experts
    vpp_size: int | None
    tp_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    copies_group: dist.ProcessGroup  # ranks with the same dense parameters: dp and cp together
    control_group: dist.ProcessGroup  # gloo over all ranks: small objects, never tensors of the model

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that uses engines, verifiers and the disk."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def copy_rank(self) -> int:
        """This rank among the dp x cp ranks that hold the same dense parameters."""
        return self.dp_rank * self.context.size + self.context.rank

    def broadcast(self, value: Any) -> Any:
        """Return global rank 0's Python object on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control_group)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's Python object, in rank order, on every rank."""
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, value, group=self.control_group)
        return boxes

    def send(self, value: Any, to: int) -> None:
        """Give a Python object to another global rank, which must `receive` it."""
        dist.send_object_list([value], dst=to, group=self.control_group)

    def receive(self, source: int) -> Any:
        """Return the Python object that a global rank sent to this one. Raises RuntimeError where that rank ended."""
        box: list[Any] = [None]
        dist.recv_object_list(box, src=source, group=self.control_group)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return on every rank whether the flag is set on any."""
        return any(self.all_gather(flag))

    def barrier(self) -> None:
        dist.barrier(group=self.control_group)

    def sum_over_data_and_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum disjointly filled tensors over dp, cp and pp ranks, in place, so that every rank has all values."""
        dist.all_reduce(tensor, group=self.copies_group)
        dist.all_reduce(tensor, group=self.pp_group)
        return tensor


def init_topology(parallel: ParallelConfig, seed: int, watched_seconds: float = 0.0) -> Topology:
    """Join the process group (from torchrun's environment, or a world of one) and create megatron's groups.

    Args:
        watched_seconds: after which a watchdog ends a run that hangs, in any phase; 0: there is none. Time-outs of the
            groups come later.

    Raises:
        UserError: the number of started ranks is not tp * cp * pp * dp.
    """
    cpu.install()
    world_size = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1
    if world_size != parallel.world_size:
        wanted = f"{parallel.tp} * {parallel.cp} * {parallel.pp} * {parallel.dp} = {parallel.world_size}"
        raise UserError("world size", world_size, f"start parallel.tp * cp * pp * dp = {wanted} ranks")
    if not dist.is_initialized():
        _join(world_size, tensor_timeout(watched_seconds))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.expert_tp,
        distributed_timeout_minutes=math.ceil(tensor_timeout(watched_seconds) / timedelta(minutes=1)),
    )
    # Weights come from a checkpoint and nothing is dropped out: the tracker that forks no CUDA generator is enough.
    model_parallel_cuda_manual_seed(seed, inference_rng_tracker=True, force_reset_rng=True)
    return Topology(
        rank=dist.get_rank(),
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel.dp,
        context=Context(
            parallel.cp, parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_group()
        ),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel.ep,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel.expert_tp,
        expert_copy_rank=parallel_state.get_expert_data_parallel_rank(),
        vpp_size=parallel.vpp,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        copies_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        control_group=dist.new_group(
            backend="gloo", timeout=_CONTROL_TIMEOUT if watched_seconds else _CONTROL_TIMEOUT_ALONE
        ),
    )


def close_topology() -> None:
    """Leave every group; the process may exit or join again."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def tensor_timeout(watched_seconds: float) -> timedelta:
    """Time-out of collectives over tensors: later than the watchdog, which names what hangs.

    Ranks also wait in them for rank 0 while it waits for an engine to take weights.

    Example:
        >>> str(tensor_timeout(3600.0)), str(tensor_timeout(60.0)), str(tensor_timeout(0.0))
        ('1:10:00', '0:40:00', '0:30:00')
    """
    if not watched_seconds:
        return _TENSOR_TIMEOUT
    return max(_TENSOR_TIMEOUT, timedelta(seconds=watched_seconds)) + _AFTER_THE_WATCHDOG


def _join(world_size: int, timeout: timedelta) -> None:
    if not cpu.on_cpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if started_by_torchrun() else 0)
    backend = "gloo" if cpu.on_cpu() else "nccl"
    if started_by_torchrun():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=world_size)
