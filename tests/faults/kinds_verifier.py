"""Faults of the verifier's pool: rules that hang, die, print, leave processes, and workers that are killed or stopped.

By the part alone: a pool with two workers and real processes. Before and after the fault, and beside it, answers are
graded as they must be.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ended import Hang, Wrong
from owpo import ROOT
from registry import fault
from trial import Trial

from owpo_megatron.types import GradingItem, Verdict
from owpo_megatron.verifiers import VerifierPool

sys.path.append(str(ROOT / "tests" / "verifiers"))
import hostile_rules  # noqa: E402

HANGS = "a rule's hang costs its time limit"
DEATHS = "a rule that dies costs its item"
OWN = "processes of a rule end with it, and none answers for another item"
LIMIT = 1.0
BUSY = 10.0  # seconds that a machine with much other work may add


@contextmanager
def pool(workers: int = 2, keeps_children: bool = False) -> Iterator[VerifierPool]:
    rules = {"hostile": hostile_rules.obey}
    one = VerifierPool(rules, workers=workers, timeout=LIMIT, memory_bytes=2**30, keeps_children=keeps_children)
    try:
        while len(_workers()) < workers:
            grade(one, "fine")
        grade(one, *["sleep 0.1"] * workers)
        yield one
    finally:
        one.close()


def grade(pool: VerifierPool, *orders: str) -> list[Verdict]:
    return pool.score([GradingItem(order, "", "hostile") for order in orders])


def expect(verdicts: list[Verdict], *reasons: str) -> None:
    found = [verdict.reason for verdict in verdicts]
    if found != list(reasons):
        raise Wrong(f"verdicts are {found}, wanted {list(reasons)}: {[verdict.detail for verdict in verdicts]}")


def _workers() -> list[psutil.Process]:
    guards = [one for one in psutil.Process().children() if "owpo_megatron.verifiers.guard" in one.cmdline()]
    return [worker for guard in guards for worker in guard.children()]


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@fault("a rule hangs", promise=HANGS, by=("part",), quick=True)
def rule_hangs(trial: Trial) -> None:
    """A loop in Python or in C code that holds the interpreter, a sleep, a stop by a signal."""
    order = trial.rng.choice(["spin", "hang", "sleep 60", "stop"])
    with pool() as one:
        verdicts = grade(one, "fine", "wrong", order, "wrong", "fine")
        expect(verdicts, "ok", "wrong", "timeout", "wrong", "ok")
        if verdicts[2].seconds > 2 * LIMIT + BUSY:
            raise Hang(f"{order} took {verdicts[2].seconds:.1f} s with a limit of {LIMIT:g} s")
        expect(grade(one, "wrong", "fine"), "wrong", "ok")


@fault("rules hang, more than there are workers", promise=HANGS, by=("part",))
def rules_hang(trial: Trial) -> None:
    """N hangs on W workers cost N / W times the limit and half a second."""
    count = 2 * trial.rng.randint(2, 3)
    with pool() as one:
        began = time.monotonic()
        expect(grade(one, *["sleep 60"] * count), *["timeout"] * count)
        taken = time.monotonic() - began
    if taken > count / 2 * (LIMIT + 0.5) + BUSY:
        raise Hang(f"{count} hangs on two workers took {taken:.1f} s with a limit of {LIMIT:g} s")


@fault("a rule's process dies", promise=DEATHS, by=("part",), quick=True)
def rule_dies(trial: Trial) -> None:
    """Exit, a signal, lack of memory, a broken socket."""
    order = trial.rng.choice(["exit", "die", "kill", "eat", "complain", "raise", "babble", "oversize", "close"])
    with pool() as one:
        expect(grade(one, "wrong", order, "wrong", "fine"), "wrong", "crashed", "wrong", "ok")


@fault("a worker of the verifier is killed", promise=DEATHS, by=("part",))
def worker_killed(trial: Trial) -> None:
    with pool() as one:
        grading = one.submit([GradingItem("sleep 0.6", "", "hostile") for _ in range(2)])
        time.sleep(trial.rng.uniform(0.1, 0.4))
        for worker in _workers():
            worker.kill()
        expect(grading.result(), "crashed", "crashed")
        expect(grade(one, "fine", "wrong"), "ok", "wrong")


@fault("a worker of the verifier is stopped", promise=HANGS, by=("part",))
def worker_stopped(trial: Trial) -> None:
    with pool() as one:
        for worker in _workers():
            worker.send_signal(signal.SIGSTOP)
        expect(grade(one, "wrong", "wrong"), "timeout", "timeout")
        expect(grade(one, "fine", "wrong"), "ok", "wrong")


@fault("a guard of the verifier is killed", promise=DEATHS, by=("part",))
def guard_killed(trial: Trial) -> None:
    """While idle, so that no item is to blame."""
    with pool() as one:
        guards = [worker.parent() for worker in _workers()]
        workers = [worker.pid for worker in _workers()]
        for guard in guards:
            guard.kill()
        psutil.wait_procs(guards, timeout=BUSY)
        expect(grade(one, "wrong", "fine", "wrong"), "wrong", "ok", "wrong")
        if any(map(_is_alive, workers)):
            raise Wrong("a worker outlived its guard")


@fault("a rule leaves processes behind", promise=OWN, by=("part",), quick=True)
def rule_leaves_processes(trial: Trial) -> None:
    """Children of its own, of a thread, and such as left its session; the rule returns, hangs or dies."""
    how = trial.rng.choice(["child", "daemon", "fork-and-stay", "thread-of-children"])
    then, reason = trial.rng.choice([("", "ok"), (" hang", "timeout"), (" die", "crashed")])
    file: Path = trial.folder / "pids"
    with pool() as one:
        expect(grade(one, f"{how} {file}{then}"), reason)
        expect(grade(one, *["wrong"] * 4), *["wrong"] * 4)
        deadline = time.monotonic() + BUSY
        while any(map(_is_alive, map(int, file.read_text().split()))):
            if time.monotonic() > deadline:
                raise Wrong(f"a process that the rule started ({how}) outlives it")
            time.sleep(0.02)


@fault("a rule leaves a timer behind", promise=OWN, by=("part",), quick=True)
def rule_leaves_a_timer(trial: Trial) -> None:
    """A time limit that the rule set for itself, and forgot: the items after it are graded as they must be."""
    with pool(1) as one:
        expect(
            grade(one, f"alarm {trial.rng.uniform(0.1, 0.3):.2f}", "sleep 0.5", "wrong", "fine"),
            "ok",
            "ok",
            "wrong",
            "ok",
        )


@fault("a process that a rule left answers for another item", promise=OWN, by=("part",))
def stray_answers(trial: Trial) -> None:
    """The rule forks and both return; a child writes `ok` for the next numbers, also where children may stay; a child
    reads the next item."""
    order, keeps = trial.rng.choice([("fork", False), ("usurp", False), ("usurp", True), ("thief", False)])
    with pool(1, keeps) as one:
        for _ in range(3):
            verdicts = grade(one, order, *["wrong"] * 4)
            expect(verdicts[1:], *["wrong"] * 4)


@fault("a rule prints into the run", promise=OWN, by=("part",))
def rule_prints(trial: Trial) -> None:
    """Neither stream of this process gets a byte of it."""
    kept = [os.dup(number) for number in (1, 2)]
    sink = os.open(trial.folder / "streams", os.O_RDWR | os.O_CREAT)
    try:
        for number in (1, 2):
            os.dup2(sink, number)
        with pool() as one:
            expect(grade(one, "print", "complain", "wrong"), "ok", "crashed", "wrong")
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(sink)
    if said := (trial.folder / "streams").read_bytes():
        raise Wrong(f"the rule's output is in the run's: {said[:200]!r}")
