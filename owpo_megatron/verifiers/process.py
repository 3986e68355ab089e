"""The pool's handle of one worker: its guard's process and socket, the current item, and the end of both."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.types import GradingItem, Judgement, VerdictReason
from owpo_megatron.verifiers import protocol
from owpo_megatron.verifiers.grading import Grading
from owpo_megatron.verifiers.protocol import frame, judged, take_frames

if TYPE_CHECKING:
    import psutil  # where it is used: `owpo doctor` must start where it is missing

STOP_GRACE = 1.0  # seconds for a guard to exit by itself once its socket is closed
RECEIVE_BYTES = 65536


@dataclass(frozen=True)
class Job:
    """One item and the place of its verdict."""

    grading: Grading
    index: int
    item: GradingItem


class WorkerProcess:
    """A guard with its worker. The guard is a plain subprocess with a socket: nothing of the parent's main module is
    imported again, and no process is forked here."""

    def __init__(self, hello: bytes):
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "owpo_megatron.verifiers.guard", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        self.socket.sendall(hello)  # fits the socket's buffer: imports begin now, not with the first item
        self.socket.setblocking(False)
        self.started = False  # its rules were imported
        self.ready = False  # there is a worker to take an item
        self.failed = False  # the guard is dead, or to be killed
        self.job: Job | None = None
        self.since = time.monotonic()  # start of its item, or of itself
        self.deadline = 0.0  # of its item; the dispatcher moves it
        self._number, self._nonce = 0, ""
        self._worker: psutil.Process | None = None
        self._cpu_at_start = 0.0
        self._replies: deque[bytes] = deque()
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None and not self.failed

    @property
    def interest(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)

    def begin(self, job: Job, seconds: float) -> None:
        """Hand over an item that has so many seconds."""
        self.job, self.since = job, time.monotonic()
        self.deadline = self.since + seconds
        self._cpu_at_start = self._cpu_seconds()
        self._number, self._nonce = self._number + 1, secrets.token_hex(8)
        self._order(protocol.GRADE + pickle.dumps((self._number, self._nonce, job.item), protocol=5))

    def end(self) -> None:
        """Have the worker killed, with all it started, and a new one forked."""
        self.ready, self.since = False, time.monotonic()
        self._order(protocol.END)

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
        try:
            self._replies.extend(take_frames(self._incoming))
        except ValueError:
            self.failed = True

    def reply(self) -> tuple[VerdictReason | Judgement, str] | None:
        """(what the rule said, detail) for its item, None before the reply."""
        while self._replies:
            body = self._replies.popleft()
            try:
                told = json.loads(body)
                if "worker" in told:
                    self._take_worker(int(told["worker"]))
                elif "died" in told:
                    if told["busy"] and self.job is not None:
                        return "crashed", str(told["died"])
                elif self.job is not None and (told["number"], told["nonce"]) == (self._number, self._nonce):
                    return judged(told["verdict"]), str(told["detail"])
            except (ValueError, TypeError, KeyError) as error:
                return "crashed", f"its reply cannot be read ({type(error).__name__}: {error})"
        return None

    def starved(self, seconds: float) -> bool:
        """Whether it is runnable but got less than this CPU time for its item: the machine is at fault."""
        import psutil

        try:
            wants_to_run = self._worker is not None and self._worker.status() == psutil.STATUS_RUNNING
        except psutil.Error:
            return False
        return wants_to_run and self._cpu_seconds() - self._cpu_at_start < seconds

    def stop(self, grace: float = STOP_GRACE) -> int:
        """Close the socket, which ends guard and worker; kill it after `grace` seconds. Returns the exit status."""
        self.socket.close()
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _take_worker(self, pid: int) -> None:
        import psutil

        self.started = self.ready = True
        try:
            self._worker = psutil.Process(pid)
        except psutil.Error:  # it has died since; the guard will report it
            self._worker = None

    def _cpu_seconds(self) -> float:
        import psutil

        try:
            times = self._worker.cpu_times() if self._worker is not None else None
        except psutil.Error:  # it has just died; the guard reports it
            return 0.0
        return times.user + times.system if times else 0.0

    def _order(self, body: bytes) -> None:
        self._outgoing = memoryview(bytes(self._outgoing) + frame(body))
        self._send()

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
