"""Grades in worker processes that can be killed: a rule may hang, crash or eat memory, the pool does neither.

                 score()                       worker process (one item at a time)
    items ---->  queue  -- item -->            rule(item)
                 waits for a reply or the deadline
    verdicts <-  in submission order  <-- reason

A worker that misses the deadline is killed, one that dies is noticed at once by the end of its socket; both get a
replacement, and the item its reason code (`timeout`, `crashed`). The workers are plain subprocesses with a socket, not
`multiprocessing`: nothing of the parent's main module is imported again, so it works under torchrun and in scripts
without a main guard, and no fork copies a process that runs gloo or CUDA threads.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence

from owpo_megatron.types import GradingItem, Verdict, VerdictReason
from owpo_megatron.verifiers.frames import READY, frame, take_frames
from owpo_megatron.verifiers.rules import Rule

STARTUP_TIMEOUT = 120.0  # seconds for a worker to import its rules, on a machine that is busy
MAX_FAILED_STARTS = 3  # in a row, after which the pool gives up
STOP_GRACE = 1.0  # seconds for a worker to exit by itself once its socket is closed
RECEIVE_BYTES = 65536


class VerifierPool:
    """A `Verifier` that outlives its rules. `score` may be called from any thread, one call at a time runs.

    Args:
        rules: rule of each domain; importable functions, they travel by name.
        workers: processes, started here and replaced when they die.
        timeout: seconds from the start of grading an item until its worker is killed.
        memory_bytes: address space of a worker; a rule that wants more is `crashed`.

    Raises:
        RuntimeError: (score) workers do not start at all.
    """

    def __init__(
        self, rules: Mapping[str, Rule], workers: int = 2, timeout: float = 5.0, memory_bytes: int = 4 * 2**30
    ):
        self._timeout = timeout
        self._hello = frame((dict(rules), 2 * timeout + 5, memory_bytes))
        self._domains = frozenset(rules)
        self._lock = threading.Lock()
        self._failed_starts = 0
        self._workers: list[_Worker] = [_Worker(self._hello) for _ in range(workers)]
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        with self._lock:
            if not self._finalizer.alive:
                raise RuntimeError("this verifier pool is closed")
            unknown = {item.domain for item in items} - self._domains
            assert not unknown, f"no rule for {unknown}"
            return self._score(items)

    def close(self) -> None:
        """End the workers; at most a second each."""
        with self._lock:
            self._finalizer()

    def _score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(items)
        waiting = deque(enumerate(items))
        unfinished = len(items)
        for place, worker in enumerate(self._workers):
            if worker.job is not None or worker.process.poll() is not None:
                # Died meanwhile, or the previous call was interrupted: its reply must not be taken for one of ours.
                worker.process.kill()
                self._replace(place)
            elif not worker.ready:  # nobody read its reply since it was started
                worker.since = time.monotonic()
        while unfinished:
            for place, worker in enumerate(self._workers):
                if worker.idle and waiting:
                    if worker.process.poll() is None:
                        worker.begin(*waiting.popleft())
                    else:  # it died with nothing to do: no item is to blame
                        self._replace(place)
            self._wait()
            for place, worker in enumerate(self._workers):
                reason = self._outcome(worker)
                if reason is None:
                    continue
                if worker.job is not None:
                    verdicts[worker.job] = Verdict(reason == "ok", reason, time.monotonic() - worker.since)
                    unfinished -= 1
                if worker.failed:
                    self._replace(place)
                else:
                    worker.job = None
        return [verdict for verdict in verdicts if verdict is not None]

    def _wait(self) -> None:
        """Until a socket has something to read or to take, or the next deadline."""
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                if not worker.idle:
                    selector.register(worker.socket, worker.interest)
            next_deadline = min(worker.since + self._limit(worker) for worker in self._workers if not worker.idle)
            ready = selector.select(max(0.0, next_deadline - time.monotonic()))
        by_socket = {worker.socket: worker for worker in self._workers}
        for key, _ in ready:
            by_socket[key.fileobj].exchange()  # type: ignore[index]

    def _limit(self, worker: _Worker) -> float:
        return self._timeout if worker.ready else STARTUP_TIMEOUT

    def _outcome(self, worker: _Worker) -> VerdictReason | None:
        """What has happened to the worker's item (or start), None while it goes on."""
        if worker.replies:
            reply = worker.replies.popleft()
            if reply == READY:
                worker.ready = True
                self._failed_starts = 0
                return None
            return reply
        if worker.failed:
            return "crashed"
        if not worker.idle and time.monotonic() >= worker.since + self._limit(worker):
            worker.process.kill()
            worker.failed = True
            return "timeout"
        return None

    def _replace(self, place: int) -> None:
        worker = self._workers[place]
        status = worker.stop(grace=STOP_GRACE)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._finalizer()
                raise RuntimeError(
                    f"verifier workers do not start (exit status {status}, {MAX_FAILED_STARTS} in a row); "
                    "their own message stands above on stderr"
                )
        self._workers[place] = _Worker(self._hello)


class _Worker:
    """One process, its socket and the item that it grades."""

    def __init__(self, hello: bytes):
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "owpo_megatron.verifiers.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a rule may print
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        self.socket.sendall(hello)  # fits the socket's buffer: imports begin now, not with the first item
        self.socket.setblocking(False)
        self.ready = False  # its rules are imported
        self.failed = False  # it is dead, or shall be
        self.job: int | None = None  # index of its item
        self.since = time.monotonic()  # start of its item, or of itself
        self.replies: deque[VerdictReason] = deque()
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None and not self.failed

    @property
    def interest(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)

    def begin(self, job: int, item: GradingItem) -> None:
        self.job, self.since = job, time.monotonic()
        self._outgoing = memoryview(frame(item))

    def exchange(self) -> None:
        """Send what the socket takes and receive what it has; never blocks."""
        try:
            if self._outgoing:
                self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
        except BlockingIOError:
            pass  # full; the selector says when to go on
        except ConnectionError:
            self.failed = True
            return
        try:
            received = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            received = b""
        if not received:
            self.failed = True
            return
        self._incoming += received
        self.replies.extend(take_frames(self._incoming))

    def stop(self, grace: float) -> int:
        """Close the socket, which ends an idle worker; kill it after `grace` seconds. Returns the exit status."""
        self.socket.close()
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        if not worker.idle:
            worker.process.kill()
        worker.stop(grace=STOP_GRACE)


def _environment() -> dict[str, str]:
    """The parent's import path, one thread, no GPU. PYTHONSAFEPATH: files of the working directory shadow nothing."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
