"""One rank of the doctor: looks at its node, and with the other ranks at what is between them.

    torchrun --nnodes=... -m owpo_megatron.doctor.probe --config run.yaml
    srun --ntasks-per-node=1 python -m owpo_megatron.doctor.probe --config run.yaml

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
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import yaml

from owpo_megatron.config import Config
from owpo_megatron.doctor.examine import examine
from owpo_megatron.doctor.finding import Finding, Scope

NODE_CHECKS = ("packages", "devices", "memory", "disk")
TIMEOUT = timedelta(seconds=120)


@dataclass(frozen=True)
class Place:
    """This rank's number, and the address where ranks meet."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int


def find_place() -> Place:
    """Read the place from torchrun's environment, else from Slurm's.

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
    """Join the others, look around, and return what all found: the same list on every rank.

    Raises:
        ImportError: torch cannot be imported on this node.
    """
    import torch
    import torch.distributed as dist

    from owpo_megatron.doctor.collectives import gather_everywhere
    from owpo_megatron.doctor.collectives_check import between

    use_nccl = scope.backend != "gloo" and torch.cuda.is_available()
    backend = "nccl" if use_nccl else "gloo"
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count()) if use_nccl else torch.device("cpu")
    if use_nccl:
        torch.cuda.set_device(device)
    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=TIMEOUT)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert control is not None
    nodes = gather_everywhere(socket.gethostname(), control)
    own = list(examine(scope, only=NODE_CHECKS)) if node_checks and place.local_rank == 0 else []
    findings = _merged(gather_everywhere((place.local_rank, own), control), nodes)
    findings += between(scope, nodes, device, control)
    dist.destroy_process_group()
    return findings


def _merged(told: list[tuple[int, list[Finding]]], nodes: list[str]) -> list[Finding]:
    """Findings of single nodes: the ones that are well in one row a check, the others with their node's name."""
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
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    scope = Scope(config, nodes, backend=arguments.backend)
    try:
        findings, speaks = look(scope, place, not arguments.between_only), place.rank == 0
    except ImportError:  # this rank cannot join the others; it reports why itself
        findings, speaks = list(examine(scope, only=["packages"])), True
    if speaks and arguments.json:
        print(json.dumps([asdict(finding) for finding in findings]))
    elif speaks:
        for finding in findings:
            print(f"{finding.status:4}  {finding.what}: {finding.detail}")
            if finding.remedy:
                print(f"      -> {finding.remedy}")
    return int(any(finding.status == "fail" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
