"""The parent's handle of one worker process: its socket, its current item, and its exit."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import psutil

from owpo_megatron.types import GradingItem, Judgement, VerdictReason
from owpo_megatron.verifiers.grading import Grading
from owpo_megatron.verifiers.protocol import READY, frame, take_frames

STOP_GRACE = 1.0  # seconds for a worker to exit by itself once its socket is closed
RECEIVE_BYTES = 65536


@dataclass(frozen=True)
class Job:
    """One item and the place of its verdict."""

    grading: Grading
    index: int
    item: GradingItem


class WorkerProcess:
    """A plain subprocess with a socket: nothing of the parent's main module is imported again, nothing is forked."""

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
        self.failed = False  # it is dead, or to be killed
        self.job: Job | None = None
        self.extensions = 0  # of its item's deadline
        self.since = time.monotonic()  # start of its item, or of itself
        self._seen = psutil.Process(self.process.pid)
        self._cpu_at_start = 0.0
        self._replies: deque[Any] = deque()
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None and not self.failed

    @property
    def interest(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)

    def begin(self, job: Job) -> None:
        self.job, self.since = job, time.monotonic()
        self.extensions, self._cpu_at_start = 0, self._cpu_seconds()
        self._outgoing = memoryview(frame(job.item))
        self._send()

    def exchange(self) -> None:
        """Send what the socket takes and receive what it has; never blocks."""
        self._send()
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
        self._replies.extend(take_frames(self._incoming))

    def reply(self) -> tuple[VerdictReason | Judgement, str] | None:
        """(reason, detail) for its item, None before the reply."""
        while self._replies:
            reply = self._replies.popleft()
            if reply != READY:
                return reply
            self.ready = True
        return None

    def starved(self, seconds: float) -> bool:
        """Whether it is runnable but got less than this CPU time for its item: the machine is at fault."""
        try:
            wants_to_run = self._seen.status() == psutil.STATUS_RUNNING
        except psutil.Error:
            return False
        return wants_to_run and self._cpu_seconds() - self._cpu_at_start < seconds

    def _cpu_seconds(self) -> float:
        try:
            times = self._seen.cpu_times()
        except psutil.Error:  # it has just died; the socket reports it
            return 0.0
        return times.user + times.system

    def stop(self, grace: float = STOP_GRACE) -> int:
        """Close the socket, which ends an idle worker; kill it after `grace` seconds. Returns the exit status."""
        self.socket.close()
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _send(self) -> None:
        try:
            if self._outgoing:
                self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
        except BlockingIOError:
            pass  # full; the selector reports when there is room
        except ConnectionError:
            self.failed = True


def _environment() -> dict[str, str]:
    """The parent's import path, one thread, no GPU. PYTHONSAFEPATH: files of the working directory shadow nothing."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
