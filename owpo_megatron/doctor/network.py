"""Names that must resolve and ports that must be free, as far as one machine can check."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from urllib.parse import urlsplit

from owpo_megatron.config import EngineConfig
from owpo_megatron.doctor.finding import Finding, Scope, Status

INTERFACE = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the nodes"


def hosts(scope: Scope) -> Iterator[Finding]:
    """This machine's own name, which gloo listens on, and every other name that the run will use."""
    own = socket.gethostname()
    addresses = resolve(own)
    if not addresses:
        status: Status = "fail" if scope.nodes > 1 else "warn"  # on one node gloo falls back to the loopback
        detail = f"this machine's name {own} does not resolve"
        yield Finding("host name", status, detail, f"add it to /etc/hosts or the name server, or {INTERFACE}")
    elif not any(map(_is_own, addresses)):
        detail = f"{own} resolves to {', '.join(addresses)}, which is not this machine"
        yield Finding("host name", "warn", detail, f"correct /etc/hosts, or {INTERFACE}")
    elif scope.nodes > 1 and all(address.startswith("127.") for address in addresses):
        detail = f"{own} resolves to {', '.join(addresses)}: other nodes cannot reach that"
        yield Finding("host name", "warn", detail, f"give it its address in /etc/hosts, or {INTERFACE}")
    else:
        yield Finding("host name", "ok", f"{own} is {', '.join(addresses)}")
    for field, name in _others(scope):
        if not resolve(name):
            yield Finding(
                "host name", "fail", f"{field}: {name} does not resolve", "correct the name, or its name server"
            )


def ports(scope: Scope) -> Iterator[Finding]:
    """The address that an engine of this run will listen on."""
    from owpo_megatron.launch.preflight import needs_own_engine

    engine = scope.config.engine if scope.config else EngineConfig()
    if scope.config is not None and not needs_own_engine(scope.config):
        yield Finding("ports", "ok", "none needed: the run starts no engine of its own")
        return
    problem = _bind(engine.host, engine.port)
    if problem is None:
        yield Finding("ports", "ok", f"{engine.host} gives {engine.port or 'free ports'}")
    elif engine.port and _bind(engine.host, 0) is None:
        detail = f"{engine.host}:{engine.port} is taken{_holder(engine.port)}: {problem}"
        yield Finding("ports", "fail", detail, "end that program, or leave engine.port out for a free one")
    else:
        yield Finding("ports", "fail", f"{engine.host}: {problem}", "set engine.host to an address of this machine")


def resolve(name: str) -> list[str]:
    """Its addresses, each once; [] when it has none."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _others(scope: Scope) -> Iterator[tuple[str, str]]:
    if scope.config is not None:
        yield "engine.host", scope.config.engine.host
        for url in scope.config.engine.urls:
            yield "engine.urls", urlsplit(url).hostname or url
    if "MASTER_ADDR" in os.environ:
        yield "MASTER_ADDR", os.environ["MASTER_ADDR"]


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address.partition("%")[0], 0))
        except OSError:
            return False
    return True


def _bind(host: str, port: int) -> str | None:
    """Why nothing can listen there; None when it can."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


def _holder(port: int) -> str:
    """` by NAME (process N)` where the system allows it; another user's processes stay unnamed."""
    try:
        import psutil

        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == "LISTEN" and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except (ImportError, OSError):  # psutil's own errors of missing rights among them
        return ""
    except Exception as error:
        if type(error).__module__.startswith("psutil"):
            return ""
        raise
    return ""
