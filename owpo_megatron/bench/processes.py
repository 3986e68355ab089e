"""Processes of a run by what they are, with the CPU seconds and the memory that each has used."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path

import psutil

# First match in the command line; the order matters: the supervisor's line has the server's.
KINDS = (
    ("sglang::scheduler", "SGLang, scheduler"),
    ("sglang::detokenizer", "SGLang, detokenizer"),
    ("supervise.py", "supervisor of SGLang"),
    ("sglang.launch_server", "SGLang, server"),
    ("owpo_megatron.verifiers", "the verifier"),
    ("owpo-rank-", "ranks of the trainer"),
    ("owpo_megatron.launch.forked", "the ranks' launcher"),
    ("owpo_megatron.launch.torchrun", "torchrun"),
    ("owpo_megatron.launch.rank", "ranks of the trainer"),
    ("step_trl.py", "TRL"),
    ("owpo_megatron.cli.main", "the command"),
)


def kind(process: psutil.Process) -> str:
    """Return what a process of a run is, by its command line; "others" where nothing fits or it has ended."""
    with contextlib.suppress(psutil.Error):
        line = " ".join([process.name(), *process.cmdline()])
        return next((name for part, name in KINDS if part in line), "others")
    return "others"


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU seconds that a process and all below it have used, by kind; with those of children that have ended."""
    used: dict[str, float] = defaultdict(float)
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used[kind(process)] += times.user + times.system + times.children_user + times.children_system
    return dict(used)


def peak_bytes(pid: int) -> dict[str, int]:
    """Peak resident bytes of the largest process of each kind (Linux)."""
    peaks: dict[str, int] = {}
    for process in tree(pid):
        with contextlib.suppress(psutil.Error, OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
            name = kind(process)
            peaks[name] = max(peak, peaks.get(name, 0))
    return peaks
