"""The pool's handle of one worker: its guard's process, the sockets to both, the current item, and the end of all."""

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
from dataclasses import dataclass

from owpo_megatron.types import GradingItem, Judgement, VerdictReason
from owpo_megatron.verifiers import protocol
from owpo_megatron.verifiers.grading import Grading
from owpo_megatron.verifiers.kin import Kin
from owpo_megatron.verifiers.link import Link
from owpo_megatron.verifiers.protocol import judged

STOP_GRACE = 1.0  # seconds for a guard to exit by itself once its socket is closed
START_GRACE = 10.0  # the same of one that could not start: its exit status is wanted
Found = tuple[VerdictReason | Judgement, str]


@dataclass(frozen=True)
class Job:
    """One item and the place of its verdict."""

    grading: Grading
    index: int
    item: GradingItem


class WorkerProcess:
    """A guard with its worker. The guard is a plain subprocess with a socket: nothing of the parent's main module is
    imported again, and no process is forked here."""

    def __init__(self, rules: bytes, selector: selectors.BaseSelector, keeps_children: bool = False):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "owpo_megatron.verifiers.guard", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
            )
        self._selector, self._keeps_children = selector, keeps_children
        self._guard = Link(ours, selector, takes_descriptors=True)
        self._guard.send(rules)  # fits the socket's buffer: imports begin now, not with the first item
        self._link: Link | None = None
        self._kin: Kin | None = None
        self.started = False  # its rules were imported
        self.ready = False  # there is a worker to take an item
        self.job: Job | None = None
        self.since = time.monotonic()  # start of its item, or of itself
        self.deadline = 0.0  # of its item; the dispatcher moves it
        self._number, self._nonce = 0, ""
        self._cpu_at_start = 0.0

    @property
    def failed(self) -> bool:
        """The guard is dead, or was killed."""
        return self._guard.ended

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None and not self.failed

    def begin(self, job: Job, seconds: float) -> None:
        """Hand over an item that has so many seconds."""
        assert self._link is not None and self._kin is not None, "there is no worker"
        self.job, self.since = job, time.monotonic()
        self.deadline = self.since + seconds
        self._cpu_at_start = self._kin.cpu_seconds()
        self._number, self._nonce = self._number + 1, secrets.token_hex(8)
        self._link.send(pickle.dumps((self._number, self._nonce, job.item), protocol=5))

    def end(self) -> None:
        """Have the worker killed, with all it started, and a new one forked."""
        self.ready, self.since = False, time.monotonic()
        self._order(protocol.END)

    def reply(self) -> Found | None:
        """(what the rule said, detail) for its item, None before the reply."""
        found = self._answer()
        while self._guard.bodies:
            told = json.loads(self._guard.bodies.popleft())
            if "worker" in told:
                self._take_worker(told["worker"])
                continue
            if self._link is not None:
                self._link.exchange()  # it may have replied before it died
            found = found or self._answer() or ("crashed", told["died"])
            self.ready, self.since = False, time.monotonic()
        if self._link is not None and self._link.ended and self.ready:
            self.ready = False
            self.since = self.since if self.job is not None else time.monotonic()
            self._order(protocol.LOST)
        return found

    def starved(self, seconds: float) -> bool:
        """Whether it is runnable but got less than this CPU time for its item: the machine is at fault."""
        kin = self._kin
        return kin is not None and kin.runnable() and kin.cpu_seconds() - self._cpu_at_start < seconds

    def kill(self) -> None:
        """Kill the guard, which ends the worker."""
        self.process.kill()
        self._guard.close()

    def stop(self) -> int:
        """Close the sockets, which ends guard and worker; kill the guard if it stays. Returns the exit status."""
        grace = START_GRACE if self.failed and not self.started else STOP_GRACE
        self._guard.close()
        self._forget_worker()
        try:
            return self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _answer(self) -> Found | None:
        """The reply to the current item, if it is there; the worker goes when it has children, or talks nonsense."""
        bodies = self._link.bodies if self._link is not None else ()
        while bodies:
            body = bodies.popleft()
            if self.job is None:
                continue  # nobody asked
            try:
                told = json.loads(body)
                if (told["number"], told["nonce"]) != (self._number, self._nonce):
                    continue
                found: Found = judged(told["verdict"]), str(told["detail"])
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                found = "crashed", f"its reply cannot be read ({type(error).__name__}: {error})"
                self.end()
            if self.ready and not self._keeps_children and not (self._kin is not None and self._kin.alone()):
                self.end()
            return found
        return None

    def _take_worker(self, pid: int) -> None:
        self._forget_worker()
        self.started = True
        connection = socket.socket(fileno=self._guard.descriptors.popleft())
        try:
            self._kin = Kin(self.process.pid, pid)
        except OSError:  # it has died since; the guard will report it
            connection.close()
            return
        self._link = Link(connection, self._selector)
        self.ready = True

    def _forget_worker(self) -> None:
        if self._link is not None and self._kin is not None:
            self._link.close()
            self._kin.close()
        self._link = self._kin = None

    def _order(self, what: bytes) -> None:
        if self._kin is not None:
            self._guard.send(what + b"%d" % self._kin.worker)


def _environment() -> dict[str, str]:
    """The parent's import path, one thread, no GPU. PYTHONSAFEPATH: files of the working directory shadow nothing."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
