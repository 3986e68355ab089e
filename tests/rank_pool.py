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
        import torch.distributed as dist

        self._jobs += 1
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = f"{self._jobs:03d}_{function.__module__}_{function.__qualname__}"
        ours, processes, logs = [], [], []
        for rank in range(count):
            reader, writer = self._context.Pipe(duplex=False)
            logs.append(self._folder / f"{job}_rank_{rank}.log")
            arguments = (writer, function, args, _place(rank, count, store.port), logs[-1])
            process = self._context.Process(target=_rank, args=arguments)
            process.start()
            writer.close()
            ours.append(reader)
            processes.append(process)
        try:
            answers = _gather(ours, timeout, [process.pid for process in processes])
        finally:
            for process in processes:
                process.join(GRACE)
                if process.is_alive():
                    process.kill()
                    process.join()
        if any(answer is None or not answer[0] for answer in answers):
            raise RankFailed(_report(job, answers, [process.exitcode for process in processes], logs))
        return [answer[1] for answer in answers if answer is not None]

    @staticmethod
    def _settings() -> dict[str, str]:
        paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
        return {
            "OMP_NUM_THREADS": "1",  # also: no threads when the server forks
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONWARNINGS": "ignore",
        }


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


def _gather(
    readers: list[connection.Connection], timeout: float, pids: list[int | None]
) -> list[tuple[bool, Any] | None]:
    """Each rank's answer; None of one that died, or was still at it when the time was over."""
    answers: list[tuple[bool, Any] | None] = [None] * len(readers)
    waiting = dict(zip(readers, range(len(readers)), strict=True))
    deadline = time.monotonic() + timeout
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            for rank in waiting.values():  # where it hangs goes to its log
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[rank] or 0, signal.SIGUSR1)
            time.sleep(0.5)
            for rank in waiting.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[rank] or 0, signal.SIGKILL)
            break
        for reader in ready:
            rank = waiting.pop(reader)  # type: ignore[arg-type]
            with contextlib.suppress(EOFError):
                answers[rank] = reader.recv()  # type: ignore[union-attr]
            answer = answers[rank]
            if answer is None or not answer[0]:
                deadline = min(deadline, time.monotonic() + GRACE)
    return answers


def _report(job: str, answers: list[Any], codes: list[int | None], logs: list[Path]) -> str:
    parts = [f"{job} on {len(answers)} ranks:"]
    for rank, (answer, code, log) in enumerate(zip(answers, codes, logs, strict=True)):
        how = f"no answer, exit code {code}" if answer is None else "returned" if answer[0] else f"raised\n{answer[1]}"
        parts.append(f"--- rank {rank}: {how}")
        text = log.read_text() if log.exists() else ""
        if text:
            parts.append(f"--- rank {rank}, output:\n{text[-3000:]}")
    return "\n".join(parts)


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
