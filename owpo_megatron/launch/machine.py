"""Facts about this machine, without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# What a figure may depend on; shown by the doctor and stamped on every benchmark.
PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "numpy",
    "math-verify",
    "latex2sympy2_extended",
    "pydantic",
    "aiohttp",
    "httpx",
    "safetensors",
)


def gpu_names() -> list[str]:
    """Names of the CUDA devices that this process may use; [] without a driver or when they are hidden.

    CUDA_VISIBLE_DEVICES counts as CUDA reads it, up to the first name that is no device: "", -1, NoDevFiles.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listing = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    names = [line.partition(":")[2].partition("(")[0].strip() for line in listing.stdout.splitlines() if "GPU" in line]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or listing.returncode:
        return names if listing.returncode == 0 else []
    parts = [part.strip() for part in visible.split(",")]
    known = [part.startswith(("GPU-", "MIG-")) or (part.isdigit() and int(part) < len(names)) for part in parts]
    return names[: [*known, False].index(False)]


def usable_gpus() -> list[str]:
    """The same where this environment's torch is a CUDA build; [] where it is not, whatever the machine has."""
    from owpo_megatron.engine.command import built_for_cuda  # here: the doctor must work where its imports do not

    names = gpu_names()
    return names if names and built_for_cuda(Path(sys.executable)) else []


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Facts for the head of a benchmark.

    Example:
        {"cpu": "x86_64", "cores": 2, "memory_gb": 23.4, "gpus": [], "system": "Linux"}
    """
    import psutil  # the doctor, who uses the rest, also works where it is missing

    return {
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpu_names(),
        "system": platform.system(),
    }


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that are installed here, and Python's."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
