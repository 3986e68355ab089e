"""Free memory of this node and of its GPUs, against what the run will take."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from owpo_megatron.doctor.facts import torch_facts
from owpo_megatron.doctor.finding import Finding, Scope
from owpo_megatron.doctor.memory_needs import count_of, host_bytes, plan_of, size

MIN_BYTES, LOW_BYTES = 2 << 30, 6 << 30
"""Thresholds without a config: engine + one rank; engine + two ranks + evaluation."""
TIGHT = 0.8


def memory(scope: Scope) -> Iterator[Finding]:
    yield _host(scope)
    if scope.config is not None:
        yield from _gpus(scope)


def _host(scope: Scope) -> Finding:
    told = psutil.virtual_memory()
    free, detail = told.available, f"{size(told.available)} free of {size(told.total)}"
    gpus = bool(torch_facts().get("devices"))
    plan = plan_of(scope.config, free, cuda=False) if scope.config and not gpus else None
    if scope.config is not None and plan is not None:
        ranks = -(-scope.world_size // scope.nodes)
        needed = host_bytes(scope.config, plan, ranks)
        detail += f"; {count_of(ranks, 'rank')} and an engine take about {size(needed)}"
        remedy = (
            "end other programs, lower optimizer.tokens_per_microbatch, or use more nodes (owpo plan has the parts)"
        )
        if needed > free:
            return Finding("memory", "fail", detail, remedy)
        return Finding("memory", "warn" if needed > TIGHT * free else "ok", detail, remedy * (needed > TIGHT * free))
    if free < MIN_BYTES:
        remedy = f"an engine alone needs about {size(MIN_BYTES)}: end other programs"
        return Finding("memory", "fail", detail, remedy)
    if free < LOW_BYTES:
        return Finding("memory", "warn", detail, "enough for the quickstart with one or two ranks, not for more")
    return Finding("memory", "ok", detail)


def _gpus(scope: Scope) -> Iterator[Finding]:
    devices = torch_facts().get("devices") or []
    if not devices or scope.config is None:
        return
    total = min(device["total_bytes"] for device in devices)
    free = min(device["free_bytes"] for device in devices)
    plan = plan_of(scope.config, total, cuda=True)
    if plan is None:
        return
    detail = f"the run takes about {size(plan.used)} of {size(total)} on each, of which {size(free)} are free"
    if plan.problem is not None:
        what, _, remedy = plan.problem.partition(": ")
        yield Finding("GPU memory", "fail", what, remedy)
    elif plan.used > free:
        yield Finding("GPU memory", "fail", detail, "another program holds some: see nvidia-smi")
    else:
        yield Finding("GPU memory", "ok", detail)
