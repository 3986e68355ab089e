"""Execute many runs on this machine's cores: each once, after the runs it needs, skipping finished ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.experiments.spec import RunSpec
from owpo_megatron.launch.machine import usable_gpus

WORKER = [sys.executable, "-m", "owpo_megatron.experiments.worker"]
_LOST = {"ok": False, "reason": "its worker exited; see logs/worker_N.log", "mistake": False}


@dataclass(frozen=True)
class Failure:
    """A run that did not finish."""

    spec: RunSpec
    reason: str
    mistake: bool  # whether it is the user's, to be fixed in the configuration


OnEvent = Callable[[str, RunSpec], None]
"""Called with ("cached" | "started" | "done" | "failed", run), from any thread."""


def run_all(
    specs: Iterable[RunSpec], root: Path, workers: int | None, on_event: OnEvent = lambda event, spec: None
) -> list[Failure]:
    """Execute every run that has not finished; return the failures, which do not stop the other runs.

    On Ctrl-C the active runs finish their step and save; the same call resumes them.

    Args:
        root: folder of the run folders.
        workers: concurrent runs; None: one per core, or one if the machine has GPUs.
    """
    queue = _Queue(with_needs(specs), root, on_event)
    if not queue.waiting:
        return []
    count = min(workers or _default_workers(), len(queue.waiting))
    logs = root.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // count)
    processes = [_start_worker(logs, index, threads) for index in range(count)]
    feeders = [threading.Thread(target=_feed, args=(process, queue), daemon=True) for process in processes]
    try:
        for feeder in feeders:
            feeder.start()
        for feeder in feeders:
            feeder.join()
    finally:
        queue.close()
        for process in processes:
            assert process.stdin is not None
            if process.poll() is None:
                process.stdin.close()
        for process in processes:
            process.wait()
    return queue.failures + [Failure(spec, "no worker was left to execute it", False) for spec in queue.waiting]


class _Queue:
    """Waiting and active runs, shared by the threads that feed the workers."""

    def __init__(self, specs: Sequence[RunSpec], root: Path, on_event: OnEvent):
        self.root, self.on_event = root, on_event
        self.waiting = [spec for spec in specs if not spec.is_done(root)]
        self.failures: list[Failure] = []
        self._active: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        for spec in specs:
            if spec.is_done(root):
                on_event("cached", spec)

    def take(self) -> RunSpec | None:
        """Return the next run whose needs have finished, waiting for one; None when nothing is left."""
        with self._changed:
            while self.waiting and not self._closed:
                for spec in self.waiting:
                    if all(needed.is_done(self.root) for needed in spec.needs):
                        self.waiting.remove(spec)
                        self._active.add(spec.key)
                        return spec
                if not self._active:
                    self._give_up_the_rest()
                    break
                self._changed.wait()
            return None

    def done(self, spec: RunSpec, failure: Failure | None) -> None:
        with self._changed:
            self._active.discard(spec.key)
            if failure:
                self.failures.append(failure)
            self._changed.notify_all()
        self.on_event("failed" if failure else "done", spec)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _give_up_the_rest(self) -> None:
        for spec in self.waiting:
            missing = ", ".join(needed.label for needed in spec.needs if not needed.is_done(self.root))
            self.failures.append(Failure(spec, f"a run it needs failed: {missing}", False))
        self.waiting.clear()


def _feed(process: subprocess.Popen[str], queue: _Queue) -> None:
    """Send runs to one worker until nothing is left or it is gone."""
    while (spec := queue.take()) is not None:
        try:
            placed = spec.placed(queue.root)
        except UserError as mistake:
            queue.done(spec, Failure(spec, str(mistake), True))
            continue
        answer = None
        try:
            queue.on_event("started", spec)
            answer = _ask(process, placed)
        finally:
            found: dict[str, Any] = answer or _LOST
            queue.done(spec, None if found["ok"] else Failure(spec, found["reason"], found["mistake"]))
        if answer is None:
            return


def _ask(process: subprocess.Popen[str], config: Config) -> dict[str, Any] | None:
    """Send a run to the worker and return its answer, None when it is gone."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(config.model_dump_json() + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except (BrokenPipeError, ValueError):  # ValueError: closed by an interrupt
        return None
    return json.loads(line) if line else None


def _start_worker(logs: Path, index: int, threads: int) -> subprocess.Popen[str]:
    with (logs / f"worker_{index}.log").open("a") as log:
        return subprocess.Popen(
            [*WORKER, str(logs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )


def with_needs(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """Return every run once, each after the runs that it needs."""
    found: dict[str, RunSpec] = {}
    for spec in specs:
        for one in (*with_needs(spec.needs), spec):
            found.setdefault(one.key, one)
    return list(found.values())


def _default_workers() -> int:
    if usable_gpus():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
