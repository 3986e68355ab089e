"""Signs of torchrun in this process's environment, and of other launchers that left their variables there."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

_OF_A_RANK = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),  # of one task; what the whole job has stays
}
# Variables of torchrun's ranks, of its options (PET_MAX_RESTARTS; Kubeflow sets some), of mpirun's ranks.
_PREFIXES = ("TORCHELASTIC_", "PET_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_")


def is_launcher_variable(name: str) -> bool:
    """Whether a launcher sets this variable for one process alone, so that ranks of another must not have it."""
    return name in _OF_A_RANK or name.startswith(_PREFIXES)


def started_by_torchrun() -> bool:
    """Whether this process is one of torchrun's ranks. RANK alone is no sign: pods and shells of other tools set it."""
    env = os.environ
    return "RANK" in env and "WORLD_SIZE" in env and ("TORCHELASTIC_RUN_ID" in env or "LOCAL_WORLD_SIZE" in env)


def launcher_leftovers() -> dict[str, str]:
    """Launcher variables of a process that no launcher started; its ranks must not inherit them."""
    return (
        {} if started_by_torchrun() else {name: os.environ[name] for name in filter(is_launcher_variable, os.environ)}
    )


def own_environment() -> dict[str, str]:
    """This environment without launcher variables, for processes that get their own."""
    return {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}


def num_nodes() -> int:
    """Machines of torchrun's ranks; 1 without torchrun."""
    if not started_by_torchrun():
        return 1
    return max(1, int(os.environ["WORLD_SIZE"]) // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))


def main_host() -> str | None:
    """Address of this machine, global rank 0's, for the other ranks' machines; None: it has none.

    torchrun's, where it is one of ours: a service of Kubernetes is not. The machine's own name otherwise, or the
    interface that leads out of it: many machines give their own name as 127.0.1.1, where no other one arrives.
    """
    if num_nodes() == 1:
        return "127.0.0.1"
    told = os.environ.get("MASTER_ADDR", "")
    for name in filter(None, (told, socket.gethostname())):
        for address in _addresses(name):
            if name == address or not address.startswith(("127.", "::1")):
                return address
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # nobody's: documentation
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))  # sends nothing
            return str(probe.getsockname()[0])
    return None


def _addresses(name: str) -> list[str]:
    """Addresses of this machine that a name has."""
    found = []
    with suppress(OSError):
        for family, _, _, _, place in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind(place)
                found.append(str(place[0]))
    return found
