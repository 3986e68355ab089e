"""One rank of the doctor: looks at its node, and with the other ranks at what is between them.

    torchrun --nnodes=... -m owpo_megatron.launch.doctor.probe --config run.yaml
    srun --ntasks-per-node=1 python -m owpo_megatron.launch.doctor.probe --config run.yaml

Under torchrun it takes that environment, under a plain srun Slurm's (MASTER_ADDR and MASTER_PORT count where they are
set). `owpo doctor` starts it in the same way; a job calls it as pre-flight, before ranks of hours are started. Rank 0
prints what was found. Exit code on every rank: 0, or 1 when anything failed anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from owpo_megatron.config import Config
from owpo_megatron.launch.doctor.examine import examine
from owpo_megatron.launch.doctor.finding import Finding, Scope
from owpo_megatron.launch.doctor.needs import count_of
from owpo_megatron.launch.doctor.network import INTERFACE, resolve
from owpo_megatron.launch.doctor.storage import existing_parent

if TYPE_CHECKING:  # torch is imported once the command line is known to be right
    import torch
    from torch.distributed import ProcessGroup

NODE_CHECKS = ("packages", "devices", "memory", "disk")
TIMEOUT = timedelta(seconds=120)
MAX_SKEW_SECONDS = 1.0
MEGABYTES = {"gloo": 16, "nccl": 256}
# Below this bus bandwidth the way is wrong rather than slow: Ethernet in place of InfiniBand, a machine that swaps.
MIN_GB_S = {"gloo": 0.05, "nccl": 5.0}


@dataclass(frozen=True)
class Place:
    """Which rank this is, and where the ranks meet."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int


def find_place() -> Place:
    """From torchrun's environment, else from Slurm's.

    Raises:
        SystemExit: neither started this process.
    """
    env = os.environ
    if "RANK" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, world, local = (int(env.get(name, "0")) for name in names)
        return Place(rank, world, local, env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    if "SLURM_PROCID" in env:
        rank, world, local = (int(env[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
        port = int(env.get("MASTER_PORT", 12000 + int(env["SLURM_JOB_ID"]) % 8000))
        return Place(rank, world, local, env.get("MASTER_ADDR") or _first_node(), port)
    sys.exit("start this by torchrun or srun; on one machine: owpo doctor")


def look(scope: Scope, place: Place, node_checks: bool) -> list[Finding]:
    """Join the others, look around, and return what all found: the same list on every rank."""
    import torch
    import torch.distributed as dist

    use_nccl = scope.backend != "gloo" and torch.cuda.is_available()
    backend = "nccl" if use_nccl else "gloo"
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count()) if use_nccl else torch.device("cpu")
    if use_nccl:
        torch.cuda.set_device(device)
    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=TIMEOUT)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert control is not None
    from owpo_megatron.launch.doctor import collectives

    nodes = collectives.gather_everywhere(socket.gethostname(), control)
    own = list(examine(scope, only=NODE_CHECKS)) if node_checks and place.local_rank == 0 else []
    findings = _merged(collectives.gather_everywhere((place.local_rank, own), control), nodes)
    findings += [_names(nodes, control), *_between(scope, backend, device, control)]
    dist.destroy_process_group()
    return findings


def _between(scope: Scope, backend: str, device: torch.device, control: ProcessGroup) -> Iterator[Finding]:
    from owpo_megatron.launch.doctor import collectives

    skew = collectives.clock_skew(control)
    detail = f"at most {skew * 1e3:.1f} ms apart"
    if skew > MAX_SKEW_SECONDS:
        yield Finding("clocks", "warn", detail, "start chrony or another time service: logs and time-outs disagree")
    else:
        yield Finding("clocks", "ok", detail)
    if scope.config is not None:
        yield _folder(scope.config, control)
    for name, measure in (("all-reduce", collectives.all_reduce), ("all-gather", collectives.all_gather)):
        speed = measure(MEGABYTES[backend], device)
        detail = f"{backend}, {speed.gb_s:.2f} GB/s on the bus at {speed.megabytes} MB"
        if not speed.right:
            remedy = "the values that arrived are wrong: leave this node out, and look at its GPUs and network"
            yield Finding(name, "fail", f"{backend}: wrong result", remedy)
        elif speed.gb_s < MIN_GB_S[backend]:
            yield Finding(name, "warn", detail, f"slow: {INTERFACE}; NCCL_DEBUG=INFO tells which way is taken")
        else:
            yield Finding(name, "ok", detail)


def _names(nodes: list[str], control: ProcessGroup) -> Finding:
    from owpo_megatron.launch.doctor import collectives

    unknown = sorted({name for name in nodes if not resolve(name)})
    at = {nodes[rank]: names for rank, names in enumerate(collectives.gather_everywhere(unknown, control)) if names}
    if not at:
        where = f"{count_of(len(nodes), 'rank')} on {count_of(len(set(nodes)), 'node')}"
        return Finding("nodes", "ok", f"{where}; every name resolves")
    told = "; ".join(f"{node} does not know {', '.join(names)}" for node, names in at.items())
    status = "fail" if len(set(nodes)) > 1 else "warn"
    return Finding("nodes", status, told, f"correct the name server or /etc/hosts, or {INTERFACE}")


def _folder(config: Config, control: ProcessGroup) -> Finding:
    from owpo_megatron.launch.doctor import collectives

    token = collectives.gather_everywhere(uuid.uuid4().hex[:8], control)[0]
    remedy = "set runs_dir to a file system that all nodes share and may write to"
    try:
        lost = collectives.strangers(existing_parent(config.run_dir), token, control)
    except OSError as error:
        return Finding("run folder", "fail", f"no file can be written for {config.run_dir}: {error.strerror}", remedy)
    if lost:
        return Finding("run folder", "fail", f"{config.run_dir} of rank 0 is not what ranks {lost} see there", remedy)
    return Finding("run folder", "ok", f"{config.run_dir} is the same for all ranks")


def _merged(told: list[tuple[int, list[Finding]]], nodes: list[str]) -> list[Finding]:
    """What nodes found by themselves: the ones that are well in one row a check, the others with their node's name."""
    findings: list[Finding] = []
    by_check: dict[str, list[tuple[str, Finding]]] = {}
    for rank, (local_rank, found) in enumerate(told):
        if local_rank == 0:
            for finding in found:
                by_check.setdefault(finding.what, []).append((nodes[rank], finding))
    for what, rows in by_check.items():
        ill = [(node, finding) for node, finding in rows if finding.status != "ok"]
        findings += [Finding(f"{what} on {node}", one.status, one.detail, one.remedy) for node, one in ill]
        if not ill:
            details = sorted({finding.detail for _, finding in rows})
            findings.append(Finding(what, "ok", details[0] if len(details) == 1 else f"e.g. {details[0]}"))
    return findings


def _first_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    first = _ask("scontrol", "show", "hostnames", nodes).split()[0]
    told = _ask("scontrol", "show", "node", first, "--oneliner")
    return next((word.partition("=")[2] for word in told.split() if word.startswith("NodeAddr=")), first)


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", "-c", type=Path, help="the run's configuration")
    parser.add_argument("--backend", default="auto", choices=("auto", "gloo", "nccl"))
    parser.add_argument("--between-only", action="store_true", help="leave out what each node finds by itself")
    parser.add_argument("--settings", help="the configuration itself, in place of --config")
    parser.add_argument("--json", action="store_true", help="print the findings as one line of JSON")
    arguments = parser.parse_args()
    place = find_place()
    config = Config.load(arguments.config) if arguments.config else None
    if arguments.settings:
        config = Config.build(yaml.safe_load(arguments.settings))
    nodes = max(1, int(os.environ.get("SLURM_NNODES", "1")))
    findings = look(Scope(config, nodes, backend=arguments.backend), place, not arguments.between_only)
    if place.rank == 0 and arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    elif place.rank == 0:
        for finding in findings:
            print(f"{finding.status:4}  {finding.what}: {finding.detail}")
            if finding.remedy:
                print(f"      -> {finding.remedy}")
    return int(any(finding.status == "fail" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
