"""Profiles the steps that the configuration names: torch.profiler's trace, and the CUDA allocator's snapshot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from owpo_megatron.config import ProfileConfig


class StepProfiler:
    """The profiler of one rank. Traces are RUN/profile/step_N_rank_R.json.gz, snapshots step_N_rank_R.memory.pickle."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int):
        self._steps = set(config.steps) if rank in config.ranks else set()
        self._memory = config.memory and torch.cuda.is_available()
        self._folder, self._rank = folder, rank

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """The block is step `step`, counted from 1."""
        if step not in self._steps:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"step_{step:06d}_rank_{self._rank}"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        with torch.profiler.profile(activities=activities, record_shapes=True) as trace:
            yield
        trace.export_chrome_trace(f"{file}.json.gz")
        if self._memory:
            torch.cuda.memory._dump_snapshot(f"{file}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
