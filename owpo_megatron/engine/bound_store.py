"""Stores of torch that listen on one interface: `python bound_store.py MODULE ARGUMENTS` runs a module with such.

torch's TCPStore listens on every interface, asks nobody who they are, and unpickles what its clients leave in it. It
takes a listening socket, though, so that its address can be chosen. The file runs in SGLang's environment as well,
which has nothing of ours, and again in each process that SGLang spawns: multiprocessing repeats the main file there.
"""

from __future__ import annotations

import datetime
import gc
import ipaddress
import os
import runpy
import socket
import sys
from importlib import import_module
from typing import Any

from torch.distributed import TCPStore


class BoundStore(TCPStore):
    """A TCPStore that listens at the address that it is given; at every interface for a name.

    A name is no choice of an interface: many machines give their own one as 127.0.1.1, where no other machine arrives.

    Args:
        host_name: what the clients of the store connect to, too.
        port: 0 chooses a free one.
    """

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        timeout: datetime.timedelta = datetime.timedelta(seconds=300),
        **options: Any,
    ):
        if is_master and (address := address_of(host_name)):
            options["master_listen_fd"] = _listen(address, port)  # the store closes it
        super().__init__(host_name, port, world_size, is_master, timeout, **options)


def address_of(host: str) -> str | None:
    """The address that a host's name is; None: it is another name.

    Example:
        >>> address_of("localhost"), address_of("10.0.0.7"), address_of("node-7")
        ('127.0.0.1', '10.0.0.7', None)
    """
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None


def _listen(address: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family).detach()


def bind_stores() -> None:
    """Have torch's own rendezvous make such stores, in this process."""
    import_module("torch.distributed.rendezvous").TCPStore = BoundStore  # type: ignore[attr-defined]


if __name__ in ("__main__", "__mp_main__"):
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != here]  # its neighbours are no modules of the other program
    bind_stores()
    if __name__ == "__main__":
        sys.argv = sys.argv[1:]
        if "--gc-threshold" in sys.argv:  # what SGLang's imports make stays; it collects garbage once it has set that
            gc.set_threshold(0)
        runpy.run_module(sys.argv[0], run_name="__main__")
