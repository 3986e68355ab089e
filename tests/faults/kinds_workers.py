"""Faults of rollout workers, the processes that ask engines for responses and grade them (owpo_megatron/workers).

The engine is that of kinds_engine.py; pool, workers and trainer are the run's own.
"""

from __future__ import annotations

import os
import signal

import psutil
from ended import Wrong
from kinds_engine import engine
from registry import fault
from trial import Running, Trial

LOST = "a rollout worker that is lost costs time alone"
START = "engine.startup_timeout=120"  # of a worker, too, on a busy machine


def impatient(argument: object) -> None:
    """Count a worker as lost after two seconds, on each rank."""
    from owpo_megatron.workers import member

    member.PING_SECONDS, member.SILENT_SECONDS = 0.2, 2.0


def _worker(run: Running, index: int) -> psutil.Process:
    ranks = [psutil.Process(pid) for pid in run.pids().values()]
    for process in (child for rank in ranks for child in rank.children()):
        if "owpo_megatron.workers.process" in process.cmdline() and process.cmdline()[-1] == str(index):
            return process
    raise Wrong(f"there is no worker {index}")


def _signalled(trial: Trial, number: signal.Signals, why: str, before: str | None = None) -> None:
    """The run goes on with the others, or alone, to the numbers of one without a fault."""
    count = trial.rng.choice([1, 2])
    with engine(trial) as one:
        run = trial.start(*one.fields, START, f"rollout.workers={count}", tp=count, before=before)
        run.wait_until(trial.reached(trial.rng.randint(1, 2)), "a step")
        index = trial.rng.randrange(count)
        os.kill(_worker(run, index).pid, number)
        ended = run.wait().done(rf"rollout worker {index} is lost \({why}\)")
    if ended.text.count("is lost") != 1:
        raise Wrong(f"something else counts as lost:\n{ended.text}")
    trial.is_noted(workers_lost=1)
    trial.same_as_without()


@fault("a rollout worker is killed", promise=LOST, by=("command", "ranks"), quick=True)
def killed(trial: Trial) -> None:
    _signalled(trial, signal.SIGKILL, "its process has ended")


@fault("a rollout worker is stopped", promise=LOST, by=("ranks",))
def stopped(trial: Trial) -> None:
    """SIGSTOP: nothing ends, and nothing comes."""
    _signalled(trial, signal.SIGSTOP, "silent for 2 s", before="kinds_workers:impatient")


@fault("a rollout worker gets the signals of a whole job", promise=LOST, by=("ranks",))
def signals_of_a_job(trial: Trial) -> None:
    """Signals to a whole job reach workers, too, and end none; at the end of the run none counts as lost."""
    with engine(trial) as one:
        run = trial.start(*one.fields, START, "rollout.workers=1")
        run.wait_until(trial.reached(1), "step 1")
        worker = _worker(run, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            worker.send_signal(number)
        ended = run.wait().done()
    if "is lost" in ended.text:
        raise Wrong(f"a worker counts as lost:\n{ended.text}")
    trial.same_as_without()
