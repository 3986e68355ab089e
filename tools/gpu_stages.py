"""Stages of tools/gpu_check.sh; each adds rows to a file as soon as they are known. Exit status 77: not run here.

Every stage compares with float64, with the exact head or bit for bit, and fails beyond the bounds it prints.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_head import fp8, head
from gpu_rows import OWPO, ROOT, Check, needs, not_run
from gpu_step import step


def machine(check: Check) -> None:
    """Device, and the versions here beside the GPU image's."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / "trainer-gpu.txt").read_text(), re.MULTILINE))
    pins |= dict(
        re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / "trainer-cpu.txt").read_text(), re.MULTILINE)
    )
    pins["torch"] = pins["torch"].partition("+")[0]
    for name in ("torch", "triton", "megatron-core", "transformers", "pydantic", "transformer-engine", "sglang"):
        try:
            here: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = None
        check.row(
            name, here=here, pinned=pins.get(name), differs=here is None or here.partition("+")[0] != pins.get(name)
        )
    if check.real:
        if not torch.cuda.is_available():
            not_run("torch sees no CUDA device")
        found = torch.cuda.get_device_properties(0)
        check.row("device", name=found.name, memory_bytes=found.total_memory, capability=f"{found.major}.{found.minor}")


def kernels(check: Check) -> None:
    """Every case of the Triton kernels and of the head made of them, compiled; interpreted in a rehearsal."""
    needs("pytest")
    needs("triton")
    files = ["tests/head/test_triton.py"] if check.real else ["tests/head/test_aot.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files], cwd=ROOT)
    check.row(", ".join(files), done.returncode == 0)


def ipc(check: Check) -> None:
    """Weights in GPU memory, read by another process."""
    needs("pytest")
    if not check.real:
        not_run("a CPU has no CUDA handles")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/sync/test_ipc.py"], cwd=ROOT
    )
    check.row("tests/sync/test_ipc.py", done.returncode == 0)


def bench(check: Check) -> None:
    """owpo bench head: the exact and the fused FP8 head, and peers that are installed."""
    shapes = "16384x4096x151936,16384x3584x151936" if check.real else "64x32x512"
    _bench(check, "head", "--device", check.device, "--shapes", shapes)


def swap(check: Check) -> None:
    """owpo bench swap: the hard swap against a copy."""
    needs("megatron")
    _bench(check, "swap", "--params", "500M" if check.real else "1M", "--rounds", "5")


def summary(check: Check) -> None:
    """Print every row as a table; adds none."""
    print("| stage | what | passed | values |\n|-|-|-|-|")
    for line in check.rows.read_text().splitlines():
        row = json.loads(line)
        values = ", ".join(f"{name} {_short(row[name])}" for name in row if name not in ("stage", "what", "passed"))
        print(f"| {row['stage']} | {row['what']} | {'yes' if row['passed'] else 'NO'} | {values} |")


# ---------------------------------------------------------------------------------------------------- shared
def _bench(check: Check, name: str, *options: str) -> None:
    needs("typer")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        done = subprocess.run([*OWPO, "bench", name, *options, "--json", str(file)], cwd=ROOT)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for row in rows:
        check.row(name, "error" not in row or "not available" in row["error"], **row)
    check.row(f"owpo bench {name}", done.returncode == 0, rows=len(rows))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


STAGES: dict[str, Callable[[Check], None]] = {
    one.__name__: one for one in (machine, kernels, head, fp8, ipc, step, bench, swap, summary)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE", help="JSON lines to add to")
    given = parser.parse_args()
    check = Check(given.stage, given.device, given.rows)
    STAGES[given.stage](check)
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
