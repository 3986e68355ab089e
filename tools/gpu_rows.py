"""Rows of tools/gpu_check.sh: one stage's results, written as they come, and what a machine may lack."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).parents[1]
OWPO = [sys.executable, "-c", "from owpo_megatron.cli.main import main; main()"]
NOT_RUN = 77
Row = dict[str, Any]


class Check:
    """One stage: where it runs and where its rows go."""

    def __init__(self, stage: str, device: str, rows: Path):
        self.stage, self.device, self.rows = stage, device, rows
        self.real = device == "cuda"
        self.failed = False
        self._before = 0

    def row(self, what: str, passed: bool = True, **values: Any) -> None:
        """Add a row; a failed one fails the stage at its end."""
        line: Row = {"stage": self.stage, "what": what, "passed": bool(passed)} | values
        with self.rows.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line)
        self.failed |= not passed

    def begin_extra(self) -> None:
        """Measure memory from here on."""
        if self.real:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def extra_bytes(self) -> int | None:
        """The peak above what was there at `begin_extra`; None on a CPU."""
        if not self.real:
            return None
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before


def not_run(reason: str) -> NoReturn:
    print(reason)
    sys.exit(NOT_RUN)


def needs(module: str) -> None:
    if not has(module):
        not_run(f"{module} is not installed")


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
