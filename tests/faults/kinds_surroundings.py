"""Faults around a run: its folder, its machine, and the people who work there."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
from ended import Lost, Wrong
from kinds_engine import engine
from registry import fault
from trial import STEPS, Trial

from owpo_megatron.cli.runs import state_of
from owpo_megatron.run.metrics_reader import read_run

HANGS = "a run that hangs ends with one line and its stacks"
STOP = "a stop finishes the step and saves it"
FOLDER = "what happens to a run's folder is noticed, or does not matter"
LIMITS = "a limit of the machine is named"


@fault("the run folder is moved away", promise=FOLDER)
def folder_moved(trial: Trial) -> None:
    """One line ends the run; put back, it goes on from its last checkpoint."""
    run = trial.start("optimizer.steps=12")
    run.wait_until(lambda: 1 in trial.saved(), "checkpoint 1")
    aside = trial.run_dir.with_name("aside")
    trial.run_dir.rename(aside)
    run.wait().refused(r"the run folder \S+ was moved or removed while the run wrote into it|No such file or directory")
    shutil.rmtree(trial.run_dir)
    aside.rename(trial.run_dir)
    trial.goes_on(at_least=1)


@fault("a checkpoint of another run among its own", promise=FOLDER, by=("command", "ranks"))
def foreign_checkpoint(trial: Trial) -> None:
    """Same model, same data, other weights: refused by name, nothing is removed, and without it the run goes on."""
    other = Trial(trial.ground, trial.folder / "other", trial.rng, "ranks")
    other.train("optimizer.lr=1e-3", "optimizer.steps=3").done()
    run = trial.start()
    run.wait_until(lambda: 2 in trial.saved(), "checkpoint 2")
    run.kill()
    shutil.rmtree(trial.checkpoint(3), ignore_errors=True)
    shutil.copytree(other.checkpoint(3), trial.checkpoint(3))
    trial.train().refused(r"checkpoints = .*are of 2 runs: .*move those of other runs", code=2)
    if 3 not in trial.saved() or 2 not in trial.saved():
        raise Lost(f"checkpoints are {trial.saved()}")
    shutil.rmtree(trial.checkpoint(3))
    trial.goes_on(at_least=2)


@fault("the run folder is a link", promise=FOLDER)
def folder_is_a_link(trial: Trial) -> None:
    far = trial.folder / "far"
    far.mkdir()
    place = trial.run_dir / trial.rng.choice(["", "checkpoints", "samples"])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(far)
    run = trial.start()
    run.wait_until(lambda: 2 in trial.saved(), "checkpoint 2")
    run.kill()
    trial.goes_on(at_least=2)
    if not place.is_symlink() or not any(far.iterdir()):
        raise Wrong(f"{place} is no link any more, or nothing was written to where it leads")


@fault("looked at while it is written", promise=FOLDER, by=("command", "ranks"))
def read_meanwhile(trial: Trial) -> None:
    """`owpo runs` and the reports' reader, as often as they can."""
    run = trial.start()
    run.wait_until(trial.reached(1), "step 1")
    looks = 0
    while run.is_running():
        state_of(trial.run_dir)
        steps = [line["step"] for line in read_run(trial.run_dir).steps]
        if steps != list(range(1, len(steps) + 1)):
            raise Wrong(f"steps that were read: {steps}")
        looks += 1
        time.sleep(0.01)
    run.wait().done()
    trial.same_as_without()
    if looks < STEPS or state_of(trial.run_dir).step != STEPS:
        raise Wrong(f"{looks} looks, the last at {state_of(trial.run_dir)}")


@fault("suspended as a whole", promise=HANGS, by=("command", "ranks"))
def suspended(trial: Trial) -> None:
    """SIGSTOP to every process, longer than what counts as a hang, then SIGCONT: the run goes on."""
    run = trial.start("checks.hang_seconds=8", tp=trial.rng.choice([1, 2]))
    run.wait_until(trial.reached(1), "step 1")
    processes = [psutil.Process(pid) for pid in run.pids().values()]
    if trial.by == "command":
        parents = [one for process in processes for one in process.parents()]
        processes += [one for one in parents if "owpo_megatron" in " ".join(one.cmdline())]
    for process in processes:
        process.suspend()
    time.sleep(20)
    for process in processes:
        process.resume()
    run.wait().done()
    trial.same_as_without()


@fault("asked to stop twice, in the middle of a step", promise=STOP, by=("command",))
def asked_twice(trial: Trial) -> None:
    """The step never ends, since the engine does not answer: the second signal does not wait for it."""
    with engine(trial, "--fault", "slow", "--times", "-1") as one:
        run = trial.start(*one.fields, "engine.request_timeout=3000")
        run.wait_until(lambda: '"rollout"' in _text(trial.logs / "alive_rank_0.json"), "the rollout", every=0.1)
        for _ in range(2):
            run.signal(signal.SIGTERM)
            time.sleep(1.0)
        ended = run.wait()
    if ended.code != 1 or "stopping within" not in ended.text or "nothing was kept" not in ended.text:
        raise Wrong(f"exit code {ended.code}:\n{ended.text}")


@fault("the launcher is killed", promise="a rank that dies ends the run with one line", by=("command",))
def launcher_killed(trial: Trial) -> None:
    """Its ranks finish their step and save it, while the folder stays locked."""
    run = trial.start("optimizer.steps=60", "rollout.max_rounds=1", tp=2)
    run.wait_until(trial.reached(1), "step 1")
    ranks = [psutil.Process(pid) for pid in run.pids().values()]
    ranks[0].parent().kill()
    run.wait().refused("the launcher was ended by SIGKILL; its ranks finish their step")
    psutil.wait_procs(ranks, timeout=60)
    if any(rank.is_running() for rank in ranks):
        raise Wrong("ranks outlive the launcher")
    if max(trial.saved(), default=0) != trial.step():
        raise Wrong(f"at step {trial.step()}, saved are {trial.saved()}")


@fault("a limit of the machine", promise=LIMITS)
def machine_limit(trial: Trial) -> None:
    """Too few files may be open, a file may not be large, there is no memory: done, or one line."""
    name, value, line = trial.rng.choice(
        [
            ("NOFILE", 12, r"Too many open files|too many open files"),
            ("FSIZE", 20_000, r"File too large|file sizes|became full"),
            ("AS", 1, r"out of memory|Cannot allocate memory|cannot allocate memory"),
        ]
    )
    ended = trial.train(before="kinds_surroundings:limit", argument=(name, value))
    if ended.code:
        ended.refused(line, code=ended.code)
    trial.goes_on(at_least=max(trial.saved(), default=0))


def limit(argument: tuple[str, int]) -> None:
    """Runs in the rank: what it has already does not count, so that it comes as far as its first own need."""
    name, value = argument
    if name == "AS":  # little more than the process has
        value = 1024 * int(Path("/proc/self/statm").read_text().split()[0]) * (resource.getpagesize() // 1024) + 2**24
    if name == "NOFILE":
        value += len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _text(file: Path) -> str:
    return json.dumps(file.read_text()).replace("\\", "") if file.exists() else ""
