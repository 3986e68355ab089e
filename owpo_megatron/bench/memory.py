"""How much memory a piece of work adds at its peak: of the process on a CPU, of torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context manager; `extra_bytes` is the peak inside minus what was held at entry. None where it cannot be known.

    On a CPU it is the kernel's own high-water mark of resident memory (Linux), which sees every allocation by whatever
    library; pages that stayed resident from earlier work hide as much of a peak, so they are given back first.
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
            _CLEAR.write_text("5")  # the high-water mark starts again at what is resident now
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
