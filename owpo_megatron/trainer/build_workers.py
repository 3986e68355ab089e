"""Starts a run's rollout workers: rank 0 listens, some ranks start a process each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from owpo_megatron.config import Config
from owpo_megatron.engine import Fleet
from owpo_megatron.errors import UserError
from owpo_megatron.launched import main_host, num_nodes
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.workers import GradingOrder, WorkerPool, WorkerProcess


def num_workers(config: Config, nodes: int) -> int:
    """Number of workers of a run on so many nodes.

    Example:
        >>> from owpo_megatron.config import Config
        >>> config = Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"}})
        >>> num_workers(config, nodes=1), num_workers(config, nodes=8)
        (0, 8)
    """
    wanted = config.rollout.workers
    if wanted == "auto":
        return nodes if nodes > 1 else 0
    return wanted


def hosts(count: int, world_size: int) -> Sequence[int]:
    """Ranks that start the workers, spread over the nodes, whose ranks follow each other.

    Example:
        >>> hosts(4, 16), hosts(3, 8)
        ([0, 4, 8, 12], [0, 2, 5])
    """
    return [index * world_size // count for index in range(count)]


def build_workers(
    config: Config,
    topology: Topology,
    needed: bool,
    order: GradingOrder | None,
    logs: Path,
    say: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> WorkerPool | None:
    """The run's workers, which start while the model is built; on rank 0, None elsewhere and without. Collective.

    Args:
        needed: of rank 0: there are engines that they can ask.
        order: of rank 0: what they grade with; None: nothing.
        say: called with a line for each worker that is lost or comes back.
        stack: what has to be closed is entered here.

    Raises:
        UserError: workers of other nodes could not reach this one.
    """
    count = num_workers(config, num_nodes())
    if not count:
        return None
    pool = None
    if topology.is_main and needed:
        host = main_host()
        if host is None:
            remedy = "is no address of rank 0's machine that others reach; set it to one, or rollout.workers=0"
            raise UserError("MASTER_ADDR", os.environ.get("MASTER_ADDR", ""), remedy)
        pool = WorkerPool(host, count, order, say)
        stack.callback(pool.close)
    meeting: tuple[tuple[str, int], bytes] | None = topology.broadcast((pool.address, pool.key) if pool else None)
    for index, rank in enumerate(hosts(count, topology.world_size)):
        if meeting and rank == topology.rank:
            worker = WorkerProcess(index, *meeting, logs / f"rollout_worker_{index}.log")
            stack.callback(worker.close)
    return pool


def put_to_work(pool: WorkerPool, fleet: Fleet, config: Config) -> None:
    """Wait for the workers, and let them send the fleet's requests.

    Raises:
        RunError: one of them does not start.
    """
    pool.wait(config.engine.startup_timeout)
    fleet.through = pool.over
