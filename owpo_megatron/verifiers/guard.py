"""The guard of one worker of the pool: `python -m owpo_megatron.verifiers.guard FD`.

    pool <------> guard <------> worker (forked: rules are imported once) <---> whatever its rule starts

The guard imports the rules and forks the worker, which takes milliseconds, so that a hang costs its time limit and
nothing else. It never runs a rule. Orphans of the worker become its children, in whatever session they are: it ends all
of them when the worker ends, and replaces a worker that has children left after an item. Where importing the rules
started threads, which a fork would lose, each worker imports them itself.
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
FORWARD_SECONDS = 30.0  # for the worker to take an item; it does nothing else
END_SECONDS = 10.0  # for the kernel to end processes


class Guard:
    """Owns the worker.

    Args:
        connection: to the pool.
    """

    def __init__(self, connection: socket.socket):
        self._pool = connection
        self._stream = connection.makefile("rb")
        body = read_frame(self._stream)
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
        while True:
            sources: list[Any] = [self._pool, self._worker, self._stderr, self._woken]
            ready, _, _ = select.select(sources, (), ())
            if self._stderr in ready:
                self._keep()
            if self._worker in ready:
                self._hear()
            if self._woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken, RECEIVE_BYTES)
                self._reap()
            if self._pool in ready:
                body = read_frame(self._stream)
                if body is None:
                    return
                if body[:1] == protocol.END:
                    self._replace()
                else:
                    self._forward(body[1:])

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
        self._worker, theirs = socket.socketpair()
        self._stderr, stderr = os.pipe()
        os.set_blocking(self._stderr, False)
        self._incoming, self._said = bytearray(), b""
        self._busy = False
        self._strays = False  # an orphan of the worker has ended: a rule started processes
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
            self._worker.settimeout(IMPORT_SECONDS)
            self._worker.sendall(protocol.frame(self._hello))
            if self._worker.recv(1) != READY:
                raise RuntimeError("a worker could not import the rules")
        self._worker.settimeout(FORWARD_SECONDS)
        self._tell(worker=self._pid)

    def _replace(self) -> None:
        self.end()
        self._worker.close()
        os.close(self._stderr)
        self._start()

    def _forward(self, body: bytes) -> None:
        self._busy = True
        try:
            self._worker.sendall(protocol.frame(body))
        except OSError:  # dead, or not reading: both are a crash
            self._crashed()

    def _hear(self) -> None:
        """The worker's reply, or its end."""
        try:
            received = self._worker.recv(RECEIVE_BYTES)
            self._incoming += received
            bodies = take_frames(self._incoming)
        except (OSError, ValueError):
            received, bodies = b"", []
        if not received:
            self._crashed()
            return
        for body in bodies:
            self._busy = False
            self._reap()
            if self._strays or descendants(os.getpid()) != [self._pid]:
                self._replace()  # before the pool sends the next item
            self._pool.sendall(protocol.frame(body))

    def _crashed(self) -> None:
        os.kill(self._pid, signal.SIGKILL)  # no-op for what has ended: only `end` and `_reap` collect it
        status = self._collect()
        self._keep()
        busy, said = self._busy, self._said.decode(errors="replace").strip().rpartition("\n")[2]
        self._tell(died=f"its process {_how(status)}{': ' + said if said else ''}", busy=busy)
        self._replace()

    def _collect(self) -> int | None:
        """The worker's own end, from before it was killed here."""
        with contextlib.suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return None

    def _reap(self) -> None:
        """Collect orphans that ended; the worker's own status is left for `_collect`."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid == self._pid:
                    return  # its socket ends, too
                os.waitpid(ended.si_pid, 0)
                self._strays = True

    def _keep(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._stderr, RECEIVE_BYTES):
                self._said = (self._said + chunk)[-KEPT:]

    def _tell(self, **values: Any) -> None:
        self._pool.sendall(told(**values))


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
    except BrokenPipeError:
        pass  # the pool is gone
    finally:
        guard.end()


if __name__ == "__main__":
    main()
