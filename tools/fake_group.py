"""A process group that is not there: this process is one of its ranks, and no other exists."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from owpo_megatron.mcore.topology import close_topology


@contextlib.contextmanager
def joined(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a fake process group; groups without it are not created."""
    new_group = dist.new_group

    def own_groups(ranks: list[int] | None = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, backend="fake", use_local_synchronization=False)

    variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "TORCHELASTIC_RUN_ID": "fake"}
    if dist.is_initialized():
        close_topology()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with mock.patch.dict(os.environ, variables), mock.patch.object(dist, "new_group", own_groups):
            yield
    finally:
        close_topology()
