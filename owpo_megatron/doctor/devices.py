"""GPUs with driver, CUDA and NCCL; Transformer Engine and apex, and what does their work where they are absent."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from owpo_megatron.config import hf_folder
from owpo_megatron.doctor.facts import torch_facts
from owpo_megatron.doctor.finding import Finding, Scope
from owpo_megatron.doctor.memory_needs import count_of
from owpo_megatron.errors import UserError
from owpo_megatron.launch.machine import gpu_names, num_cores

MIN_DRIVER = {13: 580, 12: 525}  # CUDA major version -> driver branch (CUDA's release notes, minor compatibility)
CPU_BUILD = "install torch's CUDA build (requirements/trainer-gpu.txt), or --backend gloo"


def devices(scope: Scope) -> Iterator[Finding]:
    facts = torch_facts()
    if "error" in facts:
        yield Finding("device", "fail", f"torch does not import: {facts['error']}", "see the row of torch")
        return
    names, works = gpu_names(), bool(facts.get("cuda_available"))
    if works:
        yield Finding("device", "ok", f"{', '.join(names)}; CUDA {facts['cuda']}, NCCL {facts['nccl']}")
        yield from _driver(facts)
    elif names:
        detail = f"{', '.join(names)}, but torch {facts['version']} does not use them"
        yield Finding("device", "fail" if scope.backend == "nccl" else "warn", detail, _why_unused(facts))
    else:
        yield Finding("device", "ok", "CPU: gloo, megatron's local layers, fp32")
    if scope.backend == "nccl" and not works:
        build = "is a CPU build" if facts.get("cuda") is None else "finds no CUDA device"
        yield Finding("nccl", "fail", f"NCCL is asked for, but torch {facts['version']} {build}", CPU_BUILD)
    if not names:
        yield _cores(scope)
    yield _library(facts, "transformer_engine", "Transformer Engine", "megatron's local layers", works)
    if facts.get("transformer_engine") == "works" and facts.get("apex") is None:
        yield Finding("apex", "ok", "absent: Transformer Engine has what megatron-core would call of it")
    else:
        yield _library(facts, "apex", "apex", "torch's AdamW and norms", works)
    if works:
        yield _fused(frozenset(facts["fused_by"]), scope)


def _driver(facts: dict[str, Any]) -> Iterator[Finding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return
    asked = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
    )
    driver = asked.stdout.strip().partition("\n")[0]
    needed = MIN_DRIVER.get(int(str(facts["cuda"]).partition(".")[0]))
    if needed is None or not driver[:1].isdigit():
        return
    if int(driver.partition(".")[0]) < needed:
        remedy = f"CUDA {facts['cuda']} wants {needed} or newer: update it, or use cuda-compat"
        yield Finding("driver", "warn", driver, remedy)
    else:
        yield Finding("driver", "ok", driver)


def _why_unused(facts: dict[str, Any]) -> str:
    if facts.get("cuda") is None:
        return "it is a CPU build: install the CUDA build to use them"
    return "look at CUDA_VISIBLE_DEVICES, and whether nvidia-smi's driver suits its CUDA " + str(facts["cuda"])


def _cores(scope: Scope) -> Finding:
    cores, ranks = num_cores(), -(-scope.world_size // scope.nodes)
    if cores >= ranks:
        return Finding("cores", "ok", f"{cores} for {count_of(ranks, 'rank')} on this node")
    return Finding(
        "cores", "warn", f"{cores} for {count_of(ranks, 'rank')}", "it works, slowly: lower parallel.tp, pp or dp"
    )


def _library(facts: dict[str, Any], module: str, name: str, instead: str, on_gpu: bool) -> Finding:
    state = facts.get(module)
    if state == "works":
        return _in_range(name) if module == "transformer_engine" else Finding(name, "ok", "works")
    if state is not None:
        remedy = f"build it again for torch {facts['version']}, or remove it: {instead} do its work then"
        return Finding(name, "fail" if on_gpu else "warn", f"installed, but does not import: {state}", remedy)
    if on_gpu:
        return Finding(
            name, "warn", f"absent: {instead} do its work, slower", "make setup-gpu-kernels adds Transformer Engine"
        )
    return Finding(name, "ok", f"absent: {instead} do its work (normal on a CPU)")


def _fused(have: frozenset[str], scope: Scope) -> Finding:
    """Fused kernels that the run's layers will use; of a plain model where the run's is not known."""
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.mcore.fusions import decide, line

    model, raw = None, scope.config.megatron if scope.config else {}
    if scope.config:
        with contextlib.suppress(UserError):  # the check of the model reports it
            model = read_hf_config(hf_folder(scope.config.model.path))
    fusions = decide(model, have)
    if any(one.installable for one in fusions):
        return Finding(
            "fused kernels",
            "warn",
            line(fusions, raw),
            "slower without; make setup-gpu-kernels adds Transformer Engine",
        )
    return Finding("fused kernels", "ok", line(fusions, raw))


def _in_range(name: str) -> Finding:
    """megatron-core names the range it was tested with in an extra, which nobody installs."""
    have = metadata.version("transformer-engine")
    for requirement in map(Requirement, metadata.requires("megatron-core") or []):
        if requirement.name == "transformer-engine" and not requirement.specifier.contains(have, prereleases=True):
            remedy = f"megatron-core {metadata.version('megatron-core')} is tested with {requirement.specifier}"
            return Finding(name, "warn", have, remedy)
    return Finding(name, "ok", have)
