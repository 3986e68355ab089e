"""Checkpoints that are written while the next steps train: every fault of those written in turns, and of the writer."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kinds_checkpoints
import kinds_process
import psutil
from ended import Lost, Wrong
from registry import fault
from trial import STEPS, Running, Trial

RESUMES = "a killed run resumes bit for bit"
BESIDE = "beside training: "


def _beside(inject: Callable[[Trial], None]) -> Callable[[Trial], None]:
    def with_writers(trial: Trial) -> None:
        trial.settings["checkpoint"]["asynchronous"] = True
        inject(trial)

    return with_writers


for _name, _promise, _inject in (
    ("all processes killed between two steps", RESUMES, kinds_process.killed_between_steps),
    ("all processes killed while a checkpoint is written", RESUMES, kinds_process.killed_while_saving),
    ("a signal to stop", "a stop finishes the step and saves it", kinds_process.asked_to_stop),
    ("the disk becomes full", kinds_checkpoints.LEFT, kinds_checkpoints.disk_full),
    ("a disk too small for a checkpoint", kinds_checkpoints.LEFT, kinds_checkpoints.disk_too_small),
    ("too little room for the next checkpoint", kinds_checkpoints.LEFT, kinds_checkpoints.too_little_room),
):
    fault(BESIDE + _name, promise=_promise)(_beside(_inject))


def slow_writer(argument: tuple[float, str]) -> None:
    """Make each writer of a rank leave its number in a folder, and sleep before it writes."""
    from owpo_megatron.mcore import state_writer

    (seconds, folder), write = argument, state_writer._written

    def late(*arguments: Any) -> Any:
        Path(folder, f"writer_{os.getpid()}").touch()
        time.sleep(seconds)
        return write(*arguments)

    state_writer._written = late


def _start(trial: Trial, seconds: float, *overrides: str, tp: int = 1) -> Running:
    return trial.start(*overrides, tp=tp, before="kinds_writing:slow_writer", argument=(seconds, str(trial.folder)))


def _writers(trial: Trial) -> list[int]:
    """Process ids of all writers so far, those that have ended included."""
    return [int(file.name.rpartition("_")[2]) for file in trial.folder.glob("writer_*")]


@fault(BESIDE + "all processes killed after later steps", promise=RESUMES, quick=True)
@_beside
def killed_while_training(trial: Trial) -> None:
    """Steps have been trained since the state was copied; the checkpoint before is taken, and no writer goes on."""
    trial.train("optimizer.steps=1", tp=trial.rng.choice([1, 2])).done()
    trial.settings["checkpoint"]["every"] = 2
    run = _start(trial, 3600.0, tp=trial.tp)
    run.wait_until(trial.reached(STEPS - 1), "a step beside the checkpoint of step 2")
    run.kill()
    if trial.saved() != [1]:
        raise Lost(f"checkpoints are {trial.saved()}, and that of step 2 was being written")
    writers = [psutil.Process(pid) for pid in _writers(trial) if psutil.pid_exists(pid)]
    if left := [one.pid for one in psutil.wait_procs(writers, timeout=10)[1]]:
        raise Wrong(f"writers {left} outlive the ranks")
    trial.goes_on(at_least=1)


@fault(BESIDE + "a writer is killed", promise=kinds_checkpoints.LEFT)
@_beside
def writer_killed(trial: Trial) -> None:
    """Kill them as a machine without memory does: the next step reports it, and no half checkpoint counts."""
    trial.settings["checkpoint"]["every"] = 2
    run = _start(trial, 3600.0, "optimizer.steps=12", tp=2)
    run.wait_until(lambda: len(_writers(trial)) == 2, "writers")
    for writer in _writers(trial):
        os.kill(writer, signal.SIGKILL)
    run.wait().refused(r"could not write its part of a checkpoint: its process ended with exit code -9")
    if trial.saved():
        raise Lost(f"half a checkpoint counts: {trial.saved()}")
    trial.train("optimizer.steps=12").done()


@fault(BESIDE + "the disk of a writer hangs", promise=kinds_process.HANGS)
@_beside
def writer_hangs(trial: Trial) -> None:
    """The writer never gets on: noticed at the next checkpoint, which waits for it."""
    trial.settings["checkpoint"]["every"] = 2
    run = _start(trial, 3600.0, "checks.hang_seconds=5")
    run.wait().refused(r"the run hangs: no progress on any rank for \d+ s in phase checkpoint, being written")
    if "_wait_for" not in (trial.logs / "stacks_rank_0.txt").read_text():
        raise Wrong("the stacks do not show where it hangs")
    trial.goes_on()
