"""Limits of what a program may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Isolation = Literal["namespaces", "process"]
MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of one run; what exceeds them ends the whole run, with a reason.

    Attributes:
        seconds: wall time from the start of the program.
        cpu_seconds: CPU time of all its processes together, fair on a busy machine; None: the clock alone decides.
        memory_bytes: address space of each process, and resident memory of all of them together.
        processes: at a time, threads included; by process isolation it is one, with threads.
        file_bytes: all that it writes to files; by process isolation, the size of each file.
        open_files: descriptors of each process.
        output_bytes: of stdout and of stderr, each.
    """

    seconds: float = 5.0
    cpu_seconds: float | None = None
    memory_bytes: int = 512 * MIB
    processes: int = 16
    file_bytes: int = 64 * MIB
    open_files: int = 64
    output_bytes: int = MIB
