"""Looks at everything a run needs on this machine, and says for each thing what to do when it is not right."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from owpo_megatron.config import Config, EngineConfig
from owpo_megatron.errors import UserError
from owpo_megatron.launch.machine import gpu_names, num_cores, versions
from owpo_megatron.launch.preflight import CHECKS, needs_own_engine
from owpo_megatron.rollout.command import find_device, find_python

Status = Literal["ok", "warn", "fail"]

PINNED = ("torch", "megatron-core", "transformers", "math-verify")
ENGINE_PACKAGES = ("sglang", "torch", "transformers", "owpo-sglang-cpu")
MIN_MEMORY_GB, LOW_MEMORY_GB = 2.0, 6.0
MIN_DISK_GB, LOW_DISK_GB = 1.0, 10.0

# Two processes, one all-reduce: 1 + 2 = 3 on both.
GLOO_CHECK = """
import sys, torch, torch.distributed as dist
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
value = torch.tensor([rank + 1.0])
dist.all_reduce(value)
sys.exit(0 if value.item() == 3.0 else 1)
"""


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table.

    Example:
        Finding("disk", "warn", "7.1 GB free", "a run keeps checkpoints: free some space, or set runs_dir elsewhere")
    """

    what: str
    status: Status
    detail: str
    remedy: str = ""


def examine(config: Config | None = None) -> Iterator[Finding]:
    """Every finding, as it comes; the slow ones (imports, processes) last."""
    runs_dir = config.runs_dir if config else Path("runs")
    world_size = config.parallel.world_size if config else 2
    yield from _packages()
    yield _memory()
    yield _cores(world_size)
    yield _disk(runs_dir)
    yield _ports(config.engine.host if config else "127.0.0.1")
    if config is None or needs_own_engine(config):
        yield _engine(config.engine if config else EngineConfig())
    if config is not None:
        yield from _config(config)
    yield from _devices()
    yield _gloo()


def _packages() -> Iterator[Finding]:
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield Finding("python", "ok" if supported else "warn", python, "" if supported else "3.10 to 3.12 are tested")
    wanted = dict(
        requirement.split(";")[0].strip().split("==")
        for requirement in metadata.requires("owpo_megatron") or []
        if "==" in requirement.split(";")[0]
    )
    found = versions()
    for name in PINNED:
        have, want = found.get(name), wanted.get(name)
        if have is None:
            yield Finding(name, "fail", "not installed", "run `make setup`")
        elif want is not None and have.partition("+")[0] != want:
            yield Finding(name, "warn", f"{have}; {want} is tested", f"run `make setup`, or pip install {name}=={want}")
        else:
            yield Finding(name, "ok", have)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    available, total = memory.available / 2**30, memory.total / 2**30
    detail = f"{available:.1f} GB free of {total:.1f} GB"
    if available < MIN_MEMORY_GB:
        return Finding(
            "memory", "fail", detail, f"an engine alone needs about {MIN_MEMORY_GB:g} GB: end other programs"
        )
    if available < LOW_MEMORY_GB:
        return Finding("memory", "warn", detail, "enough for the quickstart with one or two ranks, not for more")
    return Finding("memory", "ok", detail)


def _cores(world_size: int) -> Finding:
    cores = num_cores()
    if gpu_names() or cores >= world_size:
        return Finding("cores", "ok", str(cores))
    return Finding("cores", "warn", f"{cores} for {world_size} ranks", "it works, slowly: lower parallel.tp, pp or dp")


def _disk(runs_dir: Path) -> Finding:
    place = runs_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    detail = f"{free:.1f} GB free at {runs_dir}"
    if not os.access(place, os.W_OK):
        return Finding("disk", "fail", f"{place} cannot be written to", "set runs_dir to a folder that can")
    if free < MIN_DISK_GB:
        return Finding("disk", "fail", detail, "free some space, or set runs_dir elsewhere")
    if free < LOW_DISK_GB:
        return Finding("disk", "warn", detail, "checkpoints of a large model may not fit: set runs_dir elsewhere")
    return Finding("disk", "ok", detail)


def _ports(host: str) -> Finding:
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
            return Finding("ports", "ok", f"{host} gives free ports")
    except OSError as error:
        return Finding("ports", "fail", f"{host}: {error.strerror}", "set engine.host to an address of this machine")


def _engine(engine: EngineConfig) -> Finding:
    python = find_python(engine)
    code = (
        "import json, sys; from importlib import metadata\n"
        "have = {d.metadata['Name'].lower(): d.version for d in metadata.distributions()}\n"
        "print(json.dumps({name: have[name] for name in sys.argv[1:] if name in have}))"
    )
    if not os.access(python, os.X_OK):
        return Finding("engine", "fail", f"{python} is missing", "run `make setup`, or set engine.python")
    asked = subprocess.run([str(python), "-c", code, *ENGINE_PACKAGES], capture_output=True, text=True, timeout=60)
    have = json.loads(asked.stdout) if asked.returncode == 0 else {}
    detail = ", ".join(f"{name} {version}" for name, version in have.items()) or f"nothing in {python}"
    if "sglang" not in have:
        return Finding("engine", "fail", f"{python} has no SGLang", "run `make setup`, or set engine.python")
    if "owpo-sglang-cpu" not in have and find_device(engine) == "cpu":
        return Finding("engine", "fail", f"{detail}; no CPU plug-in", "run `make setup`")
    return Finding("engine", "ok", detail)


def _config(config: Config) -> Iterator[Finding]:
    """The checks that `owpo train` makes before it starts, each with its own row."""
    for check in CHECKS:
        name = "config: " + check.__name__.strip("_").replace("_", " ")
        try:
            check(config)
        except UserError as error:
            yield Finding(name, "fail", f"{error.field} = {error.value}", error.remedy)
        else:
            yield Finding(name, "ok", "")


def _devices() -> Iterator[Finding]:
    import torch

    gpus = gpu_names()
    if gpus and not torch.cuda.is_available():
        yield Finding(
            "device", "warn", f"{', '.join(gpus)}, but torch {torch.__version__} runs on the CPU alone",
            "install the CUDA build of torch to use them",
        )  # fmt: skip
    elif torch.cuda.is_available():
        yield Finding("device", "ok", f"{', '.join(gpus)}; CUDA {torch.version.cuda}")
    else:
        yield Finding("device", "ok", "CPU: gloo, megatron's local layers, fp32")
    on_gpu = torch.cuda.is_available()
    for module, name, instead in (
        ("transformer_engine", "TE", "megatron's local layers"),
        ("apex", "apex", "torch's AdamW"),
    ):
        if importlib.util.find_spec(module) is not None:
            yield Finding(name, "ok", "installed")
        elif on_gpu:
            yield Finding(name, "warn", f"absent: {instead} do the work, slower", f"install {module} for this CUDA")
        else:
            yield Finding(name, "ok", f"absent: {instead} (normal on a CPU)")


def _gloo() -> Finding:
    with tempfile.TemporaryDirectory(prefix="owpo-doctor-") as folder:
        store = str(Path(folder) / "store")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", GLOO_CHECK, str(rank), store], env=env, stderr=subprocess.PIPE, text=True
            )
            for rank in (0, 1)
        ]
        try:
            errors = [rank.communicate(timeout=90)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            errors = ["no answer within 90 s"]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
    if all(rank.returncode == 0 for rank in ranks):
        return Finding("gloo", "ok", "two ranks added their numbers")
    last = next((text.strip().splitlines()[-1] for text in errors if text.strip()), "wrong sum")
    return Finding("gloo", "fail", last, "set GLOO_SOCKET_IFNAME to a working interface, e.g. lo")
