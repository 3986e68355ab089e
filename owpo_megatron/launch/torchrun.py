"""torchrun whose store listens on the loopback interface alone: `python -m owpo_megatron.launch.torchrun ARGUMENTS`.

The store of torch listens on every interface and asks nobody who they are. Here all ranks are on this machine.
"""

from __future__ import annotations

from torch.distributed.elastic.rendezvous import static_tcp_rendezvous
from torch.distributed.run import main

from owpo_megatron.engine.bound_store import BoundStore

if __name__ == "__main__":
    static_tcp_rendezvous.TCPStore = BoundStore  # type: ignore[misc, assignment]
    main()
