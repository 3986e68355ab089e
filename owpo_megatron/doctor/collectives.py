"""Measurements that ranks make together: correct sums, bandwidth, clocks, names, a shared folder.

Every function is collective over all ranks of the default group; `control` is a gloo group of the same ranks, whatever
carries the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROUNDS = 5
PINGS = 7
FOLDER_SECONDS = 5.0  # a network file system may show a new file late


@dataclass(frozen=True)
class Speed:
    """One collective: whether its values were right, and its bus bandwidth as NCCL's tests count it.

    Example:
        Speed(right=True, gb_s=1.7, megabytes=16)
    """

    right: bool
    gb_s: float
    megabytes: int


def all_reduce(megabytes: int, device: torch.device) -> Speed:
    """Sum of every rank's number + 1; bus bytes are 2 (n - 1) / n of the message (reduce-scatter and all-gather)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    data = torch.empty(megabytes << 18, dtype=torch.float32, device=device)

    def once() -> bool:
        data.fill_(rank + 1)
        seconds.append(_timed(lambda: dist.all_reduce(data), device))
        return bool((data == world * (world + 1) / 2).all())

    seconds: list[float] = []
    right = all([once() for _ in range(ROUNDS)])
    bytes_on_bus = 2 * (world - 1) / world * data.nbytes
    return Speed(_everywhere(right), bytes_on_bus / _slowest(min(seconds)) / 1e9, megabytes)


def all_gather(megabytes: int, device: torch.device) -> Speed:
    """Every rank's block at every rank, in order; bus bytes are (n - 1) / n of the result."""
    rank, world = dist.get_rank(), dist.get_world_size()
    block = torch.full((max(1, (megabytes << 18) // world),), float(rank), device=device)
    blocks = [torch.empty_like(block) for _ in range(world)]
    seconds = [_timed(lambda: dist.all_gather(blocks, block), device) for _ in range(ROUNDS)]
    right = all(bool((blocks[other] == other).all()) for other in range(world))
    bytes_on_bus = (world - 1) * block.nbytes
    return Speed(_everywhere(right), bytes_on_bus / _slowest(min(seconds)) / 1e9, megabytes)


def clock_skew(control: dist.ProcessGroup, clock: Callable[[], float] = time.time) -> float:
    """Seconds by which any rank's clock is off rank 0's, at most; known on every rank.

    As NTP has it: rank 0 asks, and takes the other's time to be that of the middle of its wait; the fastest of a few
    tries counts. Exact to half of that round trip.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    told = torch.zeros(1, dtype=torch.float64)
    worst = torch.zeros(1, dtype=torch.float64)
    for other in range(1, world):
        best = float("inf")
        for _ in range(PINGS):
            if rank == 0:
                asked = clock()
                dist.send(told, dst=other, group=control)
                dist.recv(told, src=other, group=control)
                answered = clock()
                if answered - asked < best:
                    best = answered - asked
                    offset = abs(told.item() - (asked + answered) / 2)
            elif rank == other:
                dist.recv(told, src=0, group=control)
                told[0] = clock()
                dist.send(told, dst=0, group=control)
        if rank == 0:
            worst[0] = max(worst.item(), offset)
    dist.broadcast(worst, src=0, group=control)
    return worst.item()


def strangers(folder: Path, token: str, control: dist.ProcessGroup) -> list[int]:
    """Ranks for which `folder` is not the folder of rank 0: a file that rank 0 makes does not show there.

    Args:
        folder: exists on rank 0, whose word counts.

    Raises:
        OSError: on every rank, when rank 0 cannot write there.
    """
    folder = gather_everywhere(folder, control)[0]
    marker, error = folder / f".owpo-doctor-{token}", None
    if dist.get_rank() == 0:
        try:
            marker.write_text(token)
        except OSError as caught:
            error = caught
    error = gather_everywhere(error, control)[0]  # and rank 0 has written
    if error is not None:
        raise error
    deadline = time.monotonic() + FOLDER_SECONDS
    while not (seen := marker.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    answers = gather_everywhere(seen, control)
    if dist.get_rank() == 0:
        marker.unlink()
    return [rank for rank, sees in enumerate(answers) if not sees]


def gather_everywhere(value: Any, control: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, in order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control)
    return values


def _timed(collective: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    _wait(device)
    began = time.perf_counter()
    collective()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: float) -> float:
    longest = torch.tensor([seconds], dtype=torch.float64, device=_control_device())
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def _everywhere(right: bool) -> bool:
    answer = torch.tensor([int(right)], device=_control_device())
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer.item())


def _control_device() -> torch.device:
    """NCCL carries nothing that lies on the host."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
