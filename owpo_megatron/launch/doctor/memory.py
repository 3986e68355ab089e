"""Free memory of this node."""

from __future__ import annotations

from collections.abc import Iterator

import psutil

from owpo_megatron.launch.doctor.finding import Finding, Scope

MIN_GB, LOW_GB = 2.0, 6.0
"""An engine of the quickstart's size with one rank; with two ranks and evaluation beside it."""


def memory(scope: Scope) -> Iterator[Finding]:
    told = psutil.virtual_memory()
    available, total = told.available / 2**30, told.total / 2**30
    detail = f"{available:.1f} GB free of {total:.1f} GB"
    if available < MIN_GB:
        remedy = f"an engine alone needs about {MIN_GB:g} GB: end other programs"
        yield Finding("memory", "fail", detail, remedy)
    elif available < LOW_GB:
        yield Finding("memory", "warn", detail, "enough for the quickstart with one or two ranks, not for more")
    else:
        yield Finding("memory", "ok", detail)
