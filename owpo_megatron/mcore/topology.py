"""Process groups of tensor, context, pipeline, data and expert parallelism, and this rank's place in them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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
    home_group: dist.ProcessGroup | None = None  # gloo over the ranks with this dp rank; None: this one alone
    first_group: dist.ProcessGroup | None = None  # gloo over each dp rank's first rank; None: this is none, or the only

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

    def deal(self, parts: Sequence[Any] | None) -> Any:
        """Return global rank 0's object d on every rank of data-parallel rank d, by way of its first rank."""
        box = [parts[self.dp_rank] if parts is not None else None]
        if self.first_group is not None:
            dist.scatter_object_list(box, None if parts is None else list(parts), src=0, group=self.first_group)
        if self.home_group is not None:
            dist.broadcast_object_list(box, src=self._first_of_home(), group=self.home_group)
        return box[0]

    def report(self, value: Any) -> list[Any] | None:
        """Return the object of each data-parallel rank's first rank on global rank 0; None elsewhere."""
        if self.first_group is None:
            return [value] if self.is_main else None
        boxes: list[Any] | None = [None] * self.dp_size if self.is_main else None
        dist.gather_object(value, boxes, dst=0, group=self.first_group)
        return boxes

    def _first_of_home(self) -> int:
        return self.dp_rank * self.context.size * self.tp_size

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

    def sum_over_context_and_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum disjointly filled tensors over the cp and pp ranks of this dp rank, in place."""
        if self.context.size > 1:
            dist.all_reduce(tensor, group=self.context.group)
        dist.all_reduce(tensor, group=self.pp_group)
        return tensor

    def swap_over_data(self, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send parts[d] [n] to data-parallel rank d; return what each has sent, sizes[d] numbers."""
        found = parts[0].new_empty(sum(sizes))
        group = parallel_state.get_data_parallel_group()
        dist.all_to_all_single(found, torch.cat(list(parts)), list(sizes), [len(part) for part in parts], group=group)
        return list(found.split(list(sizes)))

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
    control_timeout = _CONTROL_TIMEOUT if watched_seconds else _CONTROL_TIMEOUT_ALONE
    control_group = dist.new_group(backend="gloo", timeout=control_timeout)
    home_group, first_group = _home_groups(parallel, control_group, control_timeout)
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
        control_group=control_group,
        home_group=home_group,
        first_group=first_group,
    )


def _home_groups(
    parallel: ParallelConfig, everyone: dist.ProcessGroup, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Return `home_group` and `first_group` of a topology. Collective; where one is all ranks, that group is taken."""
    inner = parallel.tp * parallel.cp  # ranks of one dp rank and stage, one after the other
    members = [
        [stage * inner * parallel.dp + home * inner + place for stage in range(parallel.pp) for place in range(inner)]
        for home in range(parallel.dp)
    ]
    if parallel.dp == 1:
        return (everyone if parallel.world_size > 1 else None), None
    if len(members[0]) == 1:
        return None, everyone
    rank = dist.get_rank()
    groups = [dist.new_group(ranks, timeout=timeout, backend="gloo") for ranks in members]
    first = dist.new_group([ranks[0] for ranks in members], timeout=timeout, backend="gloo")
    home = next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
    return home, first if any(rank == ranks[0] for ranks in members) else None


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
