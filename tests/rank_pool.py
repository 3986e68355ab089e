"""Ranks that start in an instant: forked, job by job, from one process that has imported torch, megatron and the rest.

    def work(topology_of: dict, folder: str) -> dict: ...      # in a module beside the test; runs on every rank

    def test_it(ranks: Ranks) -> None:
        first, second = ranks.run(2, work, {"tp": 2}, str(tmp_path))    # what each rank returned

The job finds torchrun's environment (RANK, WORLD_SIZE, ...), so `init_topology` and `dist.init_process_group("gloo")`
work as in a launch. Every job gets processes of its own: nothing of one job is left for the next, and a rank that
crashes takes nobody else down. The fork server is the standard library's (multiprocessing, "forkserver").
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PRELOAD = ["rank_imports"]
GRACE = 5.0  # seconds that ranks get to report, after one of them has failed


class RankFailed(AssertionError):
    """A job did not come to its end; the message has every rank's traceback and output."""


class Ranks:
    """The pool: one fork server, and for each job a store where its ranks find each other, as torchrun has one.

    Args:
        folder: for the ranks' output.
    """

    def __init__(self, folder: Path):
        self._folder, self._jobs = folder, 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        with _environment(self._settings()):
            forkserver.ensure_running()

    def run(self, count: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
        """Run `function(*args)` on `count` ranks; what each returned, in rank order.

        Arguments and results travel as pickles: numbers, strings, lists, dicts and paths. Tensors go through files.

        Raises:
            RankFailed: a rank raised, died, or had not returned after `timeout` seconds.
        """
        return self.start(count, function, *args).results(timeout)

    def start(self, count: int, function: Callable[..., Any], *args: Any) -> Job:
        """The same without waiting: for a test that looks at running ranks, or kills them."""
        import torch.distributed as dist

        self._jobs += 1
        name = f"{self._jobs:03d}_{function.__module__}_{function.__qualname__}"
        job = Job(name, dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        for rank in range(count):
            reader, writer = self._context.Pipe(duplex=False)
            log = self._folder / f"{name}_rank_{rank}.log"
            arguments = (writer, function, args, _place(rank, count, job.store.port), log)
            process = self._context.Process(target=_rank, args=arguments)
            process.start()
            writer.close()
            job.ranks.append(Rank(process, reader, log))
        return job

    @staticmethod
    def _settings() -> dict[str, str]:
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        return {
            "OMP_NUM_THREADS": "1",  # also: no threads when the server forks
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONWARNINGS": "ignore",
        }


@dataclass(frozen=True)
class Rank:
    process: Any
    answers: connection.Connection
    log: Path  # stdout and stderr


class Job:
    """A function on its way on several ranks."""

    def __init__(self, name: str, store: Any):
        self.name, self.store = name, store
        self.ranks: list[Rank] = []

    @property
    def output(self) -> str:
        """Return rank 0's output so far."""
        return self.ranks[0].log.read_text() if self.ranks[0].log.exists() else ""

    def is_running(self) -> bool:
        return any(rank.process.is_alive() for rank in self.ranks)

    def kill(self) -> None:
        """SIGKILL to all ranks at once, as on a machine that loses its power."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for rank in self.ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, number)
        self._join()

    def results(self, timeout: float = 300) -> list[Any]:
        """Return each rank's result; see `Ranks.run`."""
        try:
            answers = self._gather(timeout)
        finally:
            self._join()
        if any(answer is None or not answer[0] for answer in answers):
            raise RankFailed(self._report(answers))
        return [answer[1] for answer in answers if answer is not None]

    def _gather(self, timeout: float) -> list[tuple[bool, Any] | None]:
        """Each rank's answer; None of one that died, or was still at it when the time was over."""
        answers: list[tuple[bool, Any] | None] = [None] * len(self.ranks)
        waiting: dict[Any, int] = {rank.answers: index for index, rank in enumerate(self.ranks)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                for index in waiting.values():  # where it hangs goes to its log
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.ranks[index].process.pid, signal.SIGUSR1)
                time.sleep(0.5)
                self.kill()
                break
            for reader in ready:
                index = waiting.pop(reader)
                with contextlib.suppress(EOFError):
                    answers[index] = self.ranks[index].answers.recv()
                answer = answers[index]
                if answer is None or not answer[0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _join(self) -> None:
        for rank in self.ranks:
            rank.process.join(GRACE)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join()

    def _report(self, answers: list[tuple[bool, Any] | None]) -> str:
        parts = [f"{self.name} on {len(self.ranks)} ranks:"]
        for index, (rank, answer) in enumerate(zip(self.ranks, answers, strict=True)):
            if answer is None:
                how = f"no answer, exit code {rank.process.exitcode}"
            else:
                how = "returned" if answer[0] else f"raised\n{answer[1]}"
            parts.append(f"--- rank {index}: {how}")
            text = rank.log.read_text() if rank.log.exists() else ""
            if text:
                parts.append(f"--- rank {index}, output:\n{text[-3000:]}")
        return "\n".join(parts)


def _place(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment that torchrun would give this rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank(
    answers: connection.Connection, function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], log: Path
) -> None:
    """One rank of a job, in a process that was just forked."""
    from owpo_megatron.launch.rank import end_with_parent

    end_with_parent()
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(env)
    try:
        answer = True, function(*args)
    except BaseException:  # a SystemExit would be lost, too
        answer = False, traceback.format_exc()
    answers.send(answer)
    import torch.distributed as dist

    if answer[0] and dist.is_initialized():
        from owpo_megatron.mcore.topology import close_topology

        close_topology()


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
