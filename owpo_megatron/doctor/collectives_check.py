"""Checks between ranks: names, clocks, the run folder, collectives. Every function is collective over all ranks."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import torch
import torch.distributed as dist

from owpo_megatron.config import Config
from owpo_megatron.doctor.collectives import all_gather, all_reduce, clock_skew, gather_everywhere, strangers
from owpo_megatron.doctor.finding import Finding, Scope, Status
from owpo_megatron.doctor.memory_needs import count_of
from owpo_megatron.doctor.network import INTERFACE, resolve
from owpo_megatron.doctor.storage import existing_parent

MAX_SKEW_SECONDS = 1.0
MEGABYTES = {"gloo": 16, "nccl": 256}
# Below this bus bandwidth something is misconfigured: Ethernet instead of InfiniBand, a machine that swaps.
MIN_GB_S = {"gloo": 0.05, "nccl": 5.0}


def between(scope: Scope, nodes: list[str], device: torch.device, control: dist.ProcessGroup) -> Iterator[Finding]:
    """The same findings on every rank.

    Args:
        nodes: host name of every rank.
        device: that the collectives use; its backend is the default group's.
        control: a gloo group of all ranks.
    """
    yield _names(nodes, control)
    yield _clocks(control)
    if scope.config is not None:
        yield _folder(scope.config, control)
    yield from _collectives(device)


def _names(nodes: list[str], control: dist.ProcessGroup) -> Finding:
    unknown = sorted({name for name in nodes if not resolve(name)})
    at = {nodes[rank]: names for rank, names in enumerate(gather_everywhere(unknown, control)) if names}
    if not at:
        where = f"{count_of(len(nodes), 'rank')} on {count_of(len(set(nodes)), 'node')}"
        return Finding("nodes", "ok", f"{where}; every name resolves")
    told = "; ".join(f"{node} does not know {', '.join(names)}" for node, names in at.items())
    status: Status = "fail" if len(set(nodes)) > 1 else "warn"
    return Finding("nodes", status, told, f"correct the name server or /etc/hosts, or {INTERFACE}")


def _clocks(control: dist.ProcessGroup) -> Finding:
    skew = clock_skew(control)
    detail = f"at most {skew * 1e3:.1f} ms apart"
    if skew > MAX_SKEW_SECONDS:
        return Finding("clocks", "warn", detail, "start chrony or another time service: logs and time-outs disagree")
    return Finding("clocks", "ok", detail)


def _folder(config: Config, control: dist.ProcessGroup) -> Finding:
    token = gather_everywhere(uuid.uuid4().hex[:8], control)[0]
    remedy = "set runs_dir to a file system that all nodes share and may write to"
    try:
        lost = strangers(existing_parent(config.run_dir), token, control)
    except OSError as error:
        return Finding("run folder", "fail", f"no file can be written for {config.run_dir}: {error.strerror}", remedy)
    if lost:
        return Finding("run folder", "fail", f"{config.run_dir} of rank 0 is not what ranks {lost} see there", remedy)
    return Finding("run folder", "ok", f"{config.run_dir} is the same for all ranks")


def _collectives(device: torch.device) -> Iterator[Finding]:
    backend = dist.get_backend()
    if dist.get_world_size() == 1:
        yield Finding("collectives", "ok", f"{backend} starts; a single rank has nothing to exchange")
        return
    for name, measure in (("all-reduce", all_reduce), ("all-gather", all_gather)):
        speed = measure(MEGABYTES[backend], device)
        detail = f"{backend}, {speed.gb_s:.2f} GB/s on the bus at {speed.megabytes} MB"
        if not speed.right:
            remedy = "received values are wrong: exclude this node, and check its GPUs and network"
            yield Finding(name, "fail", f"{backend}: wrong result", remedy)
        elif speed.gb_s < MIN_GB_S[backend]:
            yield Finding(name, "warn", detail, f"slow: {INTERFACE}; NCCL_DEBUG=INFO logs the transport")
        else:
            yield Finding(name, "ok", detail)
