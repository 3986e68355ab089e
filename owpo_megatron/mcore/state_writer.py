"""A process per rank that writes and hashes this rank's part of a sharded checkpoint while the rank trains on.

    rank                                        its writer, forked
        plan the save, copy what is on a GPU
        fork  ------------------------------>     has the state as it was at this moment
        train                                     write files, flush them, hash them
        poll, receive  <---------------------     what was written, or the error
        write the table of contents (collective)

On a CPU nothing is copied: the fork shares the rank's memory, and the kernel copies the pages that training changes.
megatron-core plans, and writes each file; its own callers of such a save are not used. One of them imports `__main__`
again in a process that stays, the other leaves a process behind where the rank is killed, and both lose the reason
where one does not end well.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import queue
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from owpo_megatron.errors import RunError
from owpo_megatron.mcore import cpu
from owpo_megatron.run.sealed import sha256_of

PR_SET_PDEATHSIG = 1


class StateWriter:
    """Implements Writing: this rank's part of a save that megatron-core has planned.

    Args:
        request: what `dist_checkpointing.save(..., async_sharded_save=True)` returned. Its tensors may change once
            this object exists.
    """

    def __init__(self, request: AsyncRequest):
        self._finalize = request.finalize_fns
        self._results: Any = None  # where megatron looks for what was written
        self._process: Any = None
        self._running = False
        self._outcome: tuple[dict[int, Any], dict[str, str]] | BaseException = ({}, {})
        if request.async_fn is None:  # nothing to write on this rank
            return
        transforms = request.async_fn.args[0]
        _, buckets, self._results = request.async_fn_args
        on_host = request.preload_fn()
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_write, args=(transforms, on_host, sender, os.getpid()), daemon=True)
        collected = gc.isenabled()
        gc.disable()  # in the child, too: a collection there would free memory of the GPU that is not its own
        try:
            self._process.start()
        finally:
            if collected:
                gc.enable()
        sender.close()
        self._running = True
        buckets[:] = [None] * len(buckets)  # megatron counts them; their tensors are the child's now

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether this rank's part is on the disk, or failed; waits so long for it."""
        if not self._running:
            return True
        # The process's sentinel shows nothing: its other end is closed with the rank's files, at the beginning.
        if not self._receiver.poll(seconds) and self._process.is_alive():
            return False
        self._outcome = self._received()
        self._process.join()
        self._running = False
        return True

    def _received(self) -> tuple[dict[int, Any], dict[str, str]] | BaseException:
        with suppress(EOFError, OSError, pickle.UnpicklingError):
            if self._receiver.poll():
                return self._receiver.recv()
        self._process.join()
        return RuntimeError(f"its process ended with exit code {self._process.exitcode}")

    def progress(self) -> int:
        """Bytes that the process has read and written: a number that stays the same where the disk hangs."""
        try:
            with open(f"/proc/{self._process.pid}/io") as file:
                return sum(int(line.split()[1]) for line in file if line.startswith(("rchar", "wchar")))
        except (OSError, AttributeError):
            return 0

    @cpu.scoped
    def finish(self) -> dict[str, str]:
        """Write the table of contents, once every rank is `ready`; returns the hashes of all ranks' files by name.

        Raises:
            RunError: on every rank, where one could not write; the cause is that rank's error.
        """
        assert not self._running
        world = torch.distributed.get_world_size()
        outcomes: list[Any] = [None] * world
        own = self._outcome
        torch.distributed.all_gather_object(outcomes, own if isinstance(own, BaseException) else own[1])
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                raise RunError(f"rank {rank} could not write its part of a checkpoint: {outcome}") from outcome
        assert isinstance(own, tuple)
        if self._results is not None:
            self._results.put(own[0])
        for function in self._finalize:
            function()
        return {name: sha for hashes in outcomes for name, sha in hashes.items()}

    def abandon(self) -> None:
        """End the process; what it has written is half a checkpoint."""
        if self._running:
            self._process.kill()
            deadline = time.monotonic() + 1.0  # no longer: a process that waits for a disk that hangs does not end
            while self._process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            self._running = False


def _write(transforms: list[Any], buckets: Sequence[Any], sender: Connection, rank: int) -> None:
    """Write the files of one rank, in the process that was forked from it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing goes on in a folder that another run takes over
    if os.getppid() != rank:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # the rank decides what a stop means
        signal.signal(number, signal.SIG_IGN)
    kept = sender.fileno()  # engines end when the last copy of a pipe is closed, locks with the last of their files
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    outcome: tuple[dict[int, Any], dict[str, str]] | BaseException
    try:
        outcome = _written(transforms, buckets)
    except BaseException as error:
        outcome = error
    try:
        sender.send(outcome)
    except BrokenPipeError:
        pass
    except Exception:  # an error that cannot be pickled
        sender.send(RuntimeError(str(outcome)))
    with suppress(OSError):
        sender.close()


def _written(transforms: list[Any], buckets: Sequence[Any]) -> tuple[dict[int, Any], dict[str, str]]:
    """(results by number of the bucket, hashes by file name)."""
    results, hashes = {}, {}
    for index, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        count.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, answers, count, use_fsync=True)
        _, result = answers.get()
        if isinstance(result, BaseException):
            raise result
        results[index] = result
        path, name, _ = bucket
        hashes[name] = sha256_of(path)
    return results, hashes
