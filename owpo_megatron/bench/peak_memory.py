"""Peak memory added by a piece of work: the process's on a CPU, torch's allocator's on a GPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager; `extra_bytes` is the peak inside minus the memory held at entry, None if it cannot be measured.

    On a CPU it is the kernel's high-water mark of resident memory (Linux), which includes allocations of all libraries.
    Pages still resident from earlier work would hide part of the peak, so they are released first.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.extra_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif _CLEAR.exists():
            ctypes.CDLL(None).malloc_trim(0)
            _CLEAR.write_text("5")  # reset the high-water mark to the resident memory
            self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.extra_bytes = torch.cuda.max_memory_allocated() - self._before
        elif _CLEAR.exists():
            self.extra_bytes = _status_bytes("VmHWM") - self._before


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
