"""Faults of processes: killed, stopped, started twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from ended import Wrong
from registry import fault
from trial import STEPS, Trial

HANGS = "a run that hangs ends with one line and its stacks"


@fault("all processes killed between two steps", promise="a killed run resumes bit for bit", by=("command", "ranks"))
def killed_between_steps(trial: Trial) -> None:
    run = trial.start(tp=trial.rng.choice([1, 2]))
    run.wait_until(trial.reached(trial.rng.randint(1, STEPS - 1)), "a step")
    run.kill()
    trial.goes_on(at_least=max(trial.saved(), default=0))


@fault("all processes killed while a checkpoint is written", promise="a killed run resumes bit for bit")
def killed_while_saving(trial: Trial) -> None:
    step = trial.rng.randint(1, STEPS - 1)
    file = trial.rng.choice(["", "state/.metadata", "state/common.pt", "trainer.json"])
    writing = trial.run_dir / "checkpoints" / f".writing_{step:06d}" / file
    run = trial.start(tp=trial.rng.choice([1, 2]))
    run.wait_until(lambda: writing.exists() or trial.step() >= step, f"{file} of checkpoint {step}", every=0.001)
    run.kill()
    trial.goes_on(at_least=max(trial.saved(), default=0))


@fault("one of two ranks killed", promise="a rank that dies ends the run with one line", by=("command", "ranks"))
def one_rank_killed(trial: Trial) -> None:
    run = trial.start(tp=2)
    run.wait_until(trial.reached(trial.rng.randint(1, STEPS - 2)), "a step")
    rank = trial.rng.randrange(2)
    run.signal(signal.SIGKILL, rank)
    run.wait().refused(f"rank {rank} was ended by SIGKILL")
    trial.goes_on(at_least=max(trial.saved(), default=0))


@fault("a signal to stop", promise="a stop finishes the step and saves it", by=("command", "ranks"), quick=True)
def asked_to_stop(trial: Trial) -> None:
    run = trial.start("optimizer.steps=60")
    run.wait_until(trial.reached(1), "step 1")
    run.signal(trial.rng.choice([signal.SIGTERM, signal.SIGINT]))
    ended, step = run.wait(), trial.step()
    if ended.code != 0 or step == 60 or max(trial.saved()) != step:
        raise Wrong(f"exit code {ended.code}, saved {trial.saved()}, at step {step}:\n{ended.text}")
    trial.goes_on(f"optimizer.steps={max(step, STEPS)}", at_least=step)


@fault("two runs in one folder", promise="two runs never write into one folder", by=("command",))
def two_runs_in_one_folder(trial: Trial) -> None:
    first = trial.start("optimizer.steps=120", "rollout.max_rounds=1")
    first.wait_until(lambda: (trial.run_dir / ".lock").exists(), "the lock")
    fresh = trial.rng.choice([[], ["--fresh"]])  # moved aside, the first would go on under its old name
    trial.train(*fresh).refused("another owpo command works in this folder", code=2)
    first.kill()


@fault("the folder of runs is a file", promise="bad input is refused in one line", by=("command",), quick=True)
def runs_dir_is_a_file(trial: Trial) -> None:
    Path(trial.settings["runs_dir"]).write_text("not a folder")
    trial.train().refused("runs_dir = .*folder that can be written to", code=2)


@fault("one of two ranks stopped", promise=HANGS, by=("command", "ranks"))
def one_rank_stopped(trial: Trial) -> None:
    run = trial.start("checks.hang_seconds=4", "optimizer.steps=12", tp=2)
    run.wait_until(trial.reached(trial.rng.randint(1, STEPS - 2)), "a step")
    rank = trial.rng.randrange(2)
    run.signal(signal.SIGSTOP, rank)
    run.wait().refused(rf"the run hangs: no progress on any rank for \d+ s in phase .*rank {rank} does not run")
    other = trial.logs / f"stacks_rank_{1 - rank}.txt"
    if "most recent call first" not in other.read_text():
        raise Wrong(f"no stacks in {other}")
    saved = max(trial.saved(), default=0)
    trial.train("optimizer.steps=12").done(rf"resumed at step {saved}\b" if saved else "")


@fault("the only rank stopped", promise=HANGS, by=("command",))
def the_only_rank_stopped(trial: Trial) -> None:
    run = trial.start("checks.hang_seconds=2", "optimizer.steps=12")
    run.wait_until(trial.reached(1), "step 1")
    run.signal(signal.SIGSTOP, 0)
    run.wait().refused(r"no rank has shown a sign of life for \d+ s")


@fault("the disk hangs", promise=HANGS, by=("command", "ranks"))
def disk_hangs(trial: Trial) -> None:
    """metrics.jsonl becomes a pipe that nobody reads: writing a line never returns."""
    run = trial.start("checks.hang_seconds=3", "optimizer.steps=12")
    run.wait_until(trial.reached(1), "step 1")
    metrics = trial.run_dir / "metrics.jsonl"
    kept = metrics.rename(metrics.with_suffix(".kept"))
    os.mkfifo(metrics)
    run.wait().refused(r"the run hangs: no progress on any rank for \d+ s")
    if "in append" not in (trial.logs / "stacks_rank_0.txt").read_text():
        raise Wrong("the stacks do not show where it hangs")
    metrics.unlink()
    kept.rename(metrics)
    trial.train("optimizer.steps=12").done("resumed at step")
