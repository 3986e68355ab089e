"""The guard of one worker of the pool: `python -m owpo_megatron.verifiers.guard FD`.

    pool <--- orders, a worker's number and socket ---> guard
      ^                                                   | forks: rules are imported once
      '----------------- items, replies ---------------> worker <---> whatever its rule starts

The guard imports the rules and forks the worker, which takes milliseconds, so that a hang costs its time limit and
nothing else. It never runs a rule, and no item passes through it. Orphans of the worker become its children, in
whatever session they are: the pool sees them there (verifiers/kin.py) and orders another worker before the next item,
and all of them end with the worker. Where importing the rules started threads, which a fork would lose, each worker
imports them itself.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from owpo_megatron.verifiers import protocol, worker
from owpo_megatron.verifiers.protocol import read_frame, take_frames, told
from owpo_megatron.verifiers.sandbox.jail import PR_SET_CHILD_SUBREAPER, descendants, prctl

RECEIVE_BYTES = 65536
KEPT = 2000  # last characters of stderr
READY = b"+"
IMPORT_SECONDS = 120.0
END_SECONDS = 10.0  # for the kernel to end processes


class Guard:
    """Owns the worker.

    Args:
        connection: to the pool.
    """

    def __init__(self, connection: socket.socket):
        self._pool = connection
        with connection.makefile("rb") as stream:
            body = read_frame(stream)  # the pool sends nothing more before it knows of a worker
        assert body is not None, "the pool is gone"
        self._hello = body
        self._rules, self._memory_bytes = _rules_of(body)
        self._forks = len(os.listdir("/proc/self/task")) == 1
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(woken, False)
        self._woken = woken
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        prctl(PR_SET_CHILD_SUBREAPER, 1)

    def serve(self) -> None:
        self._start()
        orders = bytearray()
        while True:
            sources: list[Any] = [self._pool, self._stderr, self._woken]
            ready, _, _ = select.select(sources, (), ())
            if self._stderr in ready:
                self._keep()
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, RECEIVE_BYTES)
                self._reap()
            if self._pool in ready:
                received = self._pool.recv(RECEIVE_BYTES)
                if not received:
                    return
                orders += received
                for order in take_frames(orders):
                    self._obey(order[:1], int(order[1:]))

    def end(self) -> None:
        """Kill the worker and everything that it started."""
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    time.sleep(0.001)
            except ChildProcessError:
                return

    def _start(self) -> None:
        pools, theirs = socket.socketpair()
        self._stderr, stderr = os.pipe()
        os.set_blocking(self._stderr, False)
        self._said = b""
        self._orphan: int | None = None  # one of those that ended, left for the pool to see
        if self._forks:
            self._pid = os.fork()
            if self._pid == 0:
                _become_worker(theirs, stderr, self._rules, self._memory_bytes)
        else:
            arguments = [sys.executable, "-m", __spec__.name, "--worker", str(theirs.fileno()), str(stderr)]
            self._pid = subprocess.Popen(arguments, pass_fds=(theirs.fileno(), stderr)).pid
        theirs.close()
        os.close(stderr)
        if not self._forks:
            pools.settimeout(IMPORT_SECONDS)
            pools.sendall(protocol.frame(self._hello))
            if pools.recv(1) != READY:
                raise RuntimeError("a worker could not import the rules")
        with pools:
            socket.send_fds(self._pool, [told(worker=self._pid)], [pools.fileno()])

    def _obey(self, order: bytes, worker: int) -> None:
        if worker != self._pid:
            return  # it died before the order came
        if order == protocol.LOST:
            self._crashed()
        else:
            self._replace()

    def _replace(self) -> None:
        self.end()
        os.close(self._stderr)
        self._start()

    def _crashed(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # no-op for what has ended: only `end` and this collect it
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._keep()
        said = self._said.decode(errors="replace").strip().rpartition("\n")[2]
        self._pool.sendall(told(died=f"its process {_how(status)}{': ' + said if said else ''}"))
        self._replace()

    def _reap(self) -> None:
        """Collect what ended: orphans but for one, and the worker, which takes all others with it."""
        for pid in descendants(os.getpid()):
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                continue  # a child of the worker's
            if ended is None or pid == self._orphan:
                continue
            if pid == self._pid:
                self._crashed()
                return
            if self._orphan is None:
                self._orphan = pid
            else:
                os.waitpid(pid, 0)

    def _keep(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._stderr, RECEIVE_BYTES):
                self._said = (self._said + chunk)[-KEPT:]


def _how(status: int | None) -> str:
    if status == worker.OUT_OF_MEMORY:
        return "ran out of memory (verifier.memory_gb)"
    if status is not None and status < 0 and -status in set(signal.Signals):
        return f"was ended by {signal.Signals(-status).name} (out of memory, or a crash in C code)"
    return f"exited with status {status}"


def _rules_of(hello: bytes) -> tuple[Mapping[str, Any], int]:
    rules, memory_bytes = pickle.loads(hello)
    for rule in rules.values():
        if hasattr(rule, "warm"):
            rule.warm()
    return rules, memory_bytes


def _become_worker(connection: socket.socket, stderr: int, rules: Mapping[str, Any], memory_bytes: int) -> None:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        worker.serve(connection, stderr, rules, memory_bytes)
    finally:
        os._exit(0 if sys.exc_info()[0] in (None, SystemExit) else 1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the pool's business; it closes the socket
    if sys.argv[1] == "--worker":
        connection = socket.socket(fileno=int(sys.argv[2]))
        hello = read_frame(connection.makefile("rb"))
        if hello is not None:
            rules = _rules_of(hello)
            connection.sendall(READY)  # nothing was sent before that the first reader could have taken
            _become_worker(connection, int(sys.argv[3]), *rules)
        return
    guard = Guard(socket.socket(fileno=int(sys.argv[1])))
    try:
        guard.serve()
    except ConnectionError:
        pass  # the pool is gone
    finally:
        guard.end()


if __name__ == "__main__":
    main()
