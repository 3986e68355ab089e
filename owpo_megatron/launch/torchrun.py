"""torchrun whose store listens on the loopback interface alone: `python -m owpo_megatron.launch.torchrun ARGUMENTS`.

The store of torch listens on every interface and asks nobody who they are. Here all ranks are on this machine.
"""

from __future__ import annotations

import datetime
import socket
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous
from torch.distributed.run import main


class LoopbackStore(TCPStore):
    """A TCPStore that is given its listening socket."""

    def __init__(
        self, host: str, port: int, world_size: int, is_master: bool, timeout: datetime.timedelta, **options: Any
    ):
        listening = socket.create_server((host, port))
        super().__init__(
            host, port, world_size, is_master, timeout, master_listen_fd=listening.detach(), **options
        )  # the store closes it


if __name__ == "__main__":
    static_tcp_rendezvous.TCPStore = LoopbackStore  # type: ignore[misc, assignment]
    main()
