"""Runs many runs on this machine's cores: each once, those that others need first, none that is already there."""

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
from owpo_megatron.experiments.spec import RunSpec
from owpo_megatron.launch.machine import gpu_names

WORKER = [sys.executable, "-m", "owpo_megatron.experiments.worker"]
_LOST = {"ok": False, "reason": "its worker ended; logs/worker_N.log may say why", "mistake": False}


@dataclass(frozen=True)
class Failure:
    """A run that did not come to its end."""

    spec: RunSpec
    reason: str
    mistake: bool  # the user's, to be mended in the configuration


Tell = Callable[[str, RunSpec], None]
"""Called with ("cached" | "started" | "done" | "failed", run), from any thread."""


def run_all(
    specs: Iterable[RunSpec], root: Path, workers: int | None, tell: Tell = lambda what, spec: None
) -> list[Failure]:
    """Make every run that is not there yet; returns those that failed. The others go on without them.

    Ctrl-C lets the runs under way finish their step and save; the same call goes on from there.

    Args:
        root: the folder of the run folders.
        workers: runs at a time; None: one a core, or one on a machine with GPUs.
    """
    board = _Board(with_needs(specs), root, tell)
    if not board.waiting:
        return []
    count = min(workers or _default_workers(), len(board.waiting))
    logs = root.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // count)
    processes = [_start_worker(logs, index, threads) for index in range(count)]
    hands = [threading.Thread(target=_serve, args=(process, board), daemon=True) for process in processes]
    try:
        for hand in hands:
            hand.start()
        for hand in hands:
            hand.join()
    finally:
        board.close()
        for process in processes:
            assert process.stdin is not None
            if process.poll() is None:
                process.stdin.close()
        for process in processes:
            process.wait()
    return board.failures + [Failure(spec, "no worker was left for it", False) for spec in board.waiting]


class _Board:
    """What waits, what is under way, what is done; shared by the threads that feed the workers."""

    def __init__(self, specs: Sequence[RunSpec], root: Path, tell: Tell):
        self.root, self.tell = root, tell
        self.waiting = [spec for spec in specs if not spec.is_done(root)]
        self.failures: list[Failure] = []
        self._under_way: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False
        for spec in specs:
            if spec.is_done(root):
                tell("cached", spec)

    def take(self) -> RunSpec | None:
        """The next run that has what it needs; waits for one, None when nothing is left to do."""
        with self._changed:
            while self.waiting and not self._closed:
                for spec in self.waiting:
                    if all(needed.is_done(self.root) for needed in spec.needs):
                        self.waiting.remove(spec)
                        self._under_way.add(spec.key)
                        return spec
                if not self._under_way:
                    self._give_up_the_rest()
                    break
                self._changed.wait()
            return None

    def done(self, spec: RunSpec, failure: Failure | None) -> None:
        with self._changed:
            self._under_way.discard(spec.key)
            if failure:
                self.failures.append(failure)
            self._changed.notify_all()
        self.tell("failed" if failure else "done", spec)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _give_up_the_rest(self) -> None:
        for spec in self.waiting:
            missing = ", ".join(needed.label for needed in spec.needs if not needed.is_done(self.root))
            self.failures.append(Failure(spec, f"what it needs failed: {missing}", False))
        self.waiting.clear()


def _serve(process: subprocess.Popen[str], board: _Board) -> None:
    """Hand runs to one worker until nothing is left or it is gone."""
    while (spec := board.take()) is not None:
        answer = None
        try:
            board.tell("started", spec)
            answer = _ask(process, spec.placed(board.root))
        finally:
            found: dict[str, Any] = answer or _LOST
            board.done(spec, None if found["ok"] else Failure(spec, found["reason"], found["mistake"]))
        if answer is None:
            return


def _ask(process: subprocess.Popen[str], config: Config) -> dict[str, Any] | None:
    """The worker's answer, None when it is gone."""
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
    """Every run once, behind the runs that it needs."""
    found: dict[str, RunSpec] = {}
    for spec in specs:
        for one in (*with_needs(spec.needs), spec):
            found.setdefault(one.key, one)
    return list(found.values())


def _default_workers() -> int:
    if gpu_names():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
