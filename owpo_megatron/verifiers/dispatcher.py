"""Thread that hands items to workers, watches their deadlines and replaces workers that fail."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque

from owpo_megatron.types import Judgement, Verdict, VerdictReason
from owpo_megatron.verifiers.process import Job, WorkerProcess

STARTUP_TIMEOUT = 120.0  # seconds for a worker to import its rules, on a machine that is busy
STARVED = 2  # times the limit that a worker gets which the machine does not let run
LOOKS = 4  # at such a worker, within one limit
MAX_FAILED_STARTS = 3  # in a row, after which the pool gives up


class Dispatcher:
    """Owns the workers; all but `enqueue` and `close` runs in its thread.

    Args:
        rules: first message to a guard: rules and limits of its worker.
        workers: processes that grade at the same time.
        timeout: seconds from the start of grading an item until its worker is killed; at most twice that for one that
            is runnable but got less than half of it in CPU time, because then the machine is at fault.
        max_pending: items that wait or are being graded, beyond which `enqueue` blocks.
        keeps_children: workers with children are not replaced.
    """

    def __init__(self, rules: bytes, workers: int, timeout: float, max_pending: int, keeps_children: bool = False):
        self._rules, self._keeps_children = rules, keeps_children
        self._timeout = timeout
        self._max_pending = max_pending
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Job] = deque()
        self._pending = 0
        self._error: Exception | None = None
        self._closing = False
        self._wake_up, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._failed_starts = 0
        self._workers = [self._start() for _ in range(workers)]
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()

    def enqueue(self, job: Job) -> None:
        """Queue an item; blocks while too many are pending.

        Raises:
            RuntimeError: the pool is closed, or its workers do not start.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pending < self._max_pending or self._error is not None)
            if self._error is not None:
                raise self._error
            self._pending += 1
            self._waiting.append(job)
            if len(self._waiting) == 1:
                self._wake_up.send(b"!")

    def close(self) -> None:
        """End the workers and the thread; items without a verdict fail."""
        with self._changed:
            self._closing = True
            if self._error is None:
                self._wake_up.send(b"!")
        self._thread.join()

    def _run(self) -> None:
        error: Exception = RuntimeError("this verifier pool is closed")
        try:
            while not self._closing:
                self._hand_out()
                for key, _ in self._selector.select(self._seconds_to_wait()):
                    if key.data is None:
                        self._woken.recv(4096)
                    else:
                        key.data.exchange()
                self._collect()
        except Exception as reason:  # any error must reach the waiting callers
            error = reason
        self._end(error)

    def _hand_out(self) -> None:
        for place, worker in enumerate(self._workers):
            while worker.idle and (job := self._next_job()) is not None:
                if worker.process.poll() is not None:  # it died with nothing to do: no item is to blame
                    with self._changed:
                        self._waiting.appendleft(job)
                    self._replace(place)
                    break
                worker.begin(job, self._timeout)

    def _next_job(self) -> Job | None:
        with self._changed:
            while self._waiting:
                job = self._waiting.popleft()
                if not job.grading.cancelled:
                    return job
                self._settled()
        return None

    def _settled(self) -> None:
        """Count one item less as pending; the lock must be held."""
        self._pending -= 1
        self._changed.notify()

    def _seconds_to_wait(self) -> float | None:
        busy = [worker for worker in self._workers if not worker.idle]
        if not busy:
            return None
        return max(0.0, min(map(_deadline, busy)) - time.monotonic())

    def _collect(self) -> None:
        for place, worker in enumerate(self._workers):
            began = worker.since
            outcome = self._outcome(worker)
            if worker.job is not None and outcome is not None:
                job, worker.job = worker.job, None
                found, detail = outcome
                job.grading.put(job.index, Verdict.of(found, time.monotonic() - began, detail))
                with self._changed:
                    self._settled()
            if worker.failed:
                self._replace(place)

    def _outcome(self, worker: WorkerProcess) -> tuple[VerdictReason | Judgement, str] | None:
        """(what the rule found, detail) for the worker's item, None without; ends a worker that is late."""
        had_started = worker.started
        reply = worker.reply()
        if worker.started and not had_started:
            self._failed_starts = 0
        if reply is not None:
            return reply
        if worker.failed:
            return "crashed", "its process and the guard of it were killed"
        now = time.monotonic()
        if worker.idle or now < _deadline(worker):
            return None
        if worker.job is None:  # neither started nor replaced in time
            worker.kill()
            return None
        last = worker.since + STARVED * self._timeout
        if now < last and worker.starved(self._timeout / 2):
            worker.deadline = min(now + self._timeout / LOOKS, last)
            return None
        taken = now - worker.since
        worker.end()
        return "timeout", f"no verdict within {taken:.1f} s"

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._rules, self._selector, self._keeps_children)

    def _replace(self, place: int) -> None:
        self._discard(self._workers[place])
        self._workers[place] = self._start()

    def _discard(self, worker: WorkerProcess) -> None:
        status = worker.stop()
        if not worker.started:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"verifier workers do not start (exit status {status}, {MAX_FAILED_STARTS} in a row); "
                    "their own message is above, on stderr"
                )

    def _end(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            unfinished = {job.grading for job in self._waiting}
            self._waiting.clear()
            self._changed.notify_all()
        for worker in self._workers:
            if worker.job is not None:
                unfinished.add(worker.job.grading)
            if not worker.started:
                worker.process.kill()
            worker.stop()
        for grading in unfinished:
            grading.fail(error)
        self._selector.close()
        self._wake_up.close()
        self._woken.close()


def _deadline(worker: WorkerProcess) -> float:
    return worker.deadline if worker.job is not None else worker.since + STARTUP_TIMEOUT
