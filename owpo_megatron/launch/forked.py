"""Ranks on a CPU: import once, fork the ranks, and watch them as torchrun does.

    python -m owpo_megatron.launch.forked NUMBER_OF_RANKS MODULES LOGS MODULE [its arguments]

torchrun starts an interpreter per rank, each of which imports torch and megatron-core (four CPU seconds). Here the
parent imports MODULES (comma-separated) and forks. A rank finds torchrun's variables, and a store in this process, so
that it does not notice a difference. After a failure the others get SIGTERM, then SIGKILL; the log names the exit codes
in torchrun's words, which launch/reason.py reads.

A fork copies only the calling thread, and no CUDA context survives it: ranks on GPUs are torchrun's (launch/local.py),
and where an import has started a thread, this process becomes torchrun, too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from owpo_megatron.launch import rank
from owpo_megatron.launch.local import SHUTDOWN_SECONDS, torchrun_command

HOST = "127.0.0.1"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(world_size: int, modules: list[str], logs: Path, module: str, arguments: list[str]) -> int:
    """Run `module` on forked ranks. Returns in each of the ranks, too, with its own exit code.

    Signals: the first SIGTERM or SIGINT goes to the ranks, which save their step; a second one ends them.
    """
    for number in _SIGNALS:
        signal.signal(number, rank.end_before_the_start)
    rank.end_with_parent()
    _import(modules)
    if _threads() > 1:
        print(f"launch: the imports started {_threads() - 1} threads; torchrun starts the ranks", file=sys.stderr)
        command = torchrun_command(world_size, logs, module, arguments)
        os.execv(command[0], command)
    listener = socket.create_server((HOST, 0))  # before the fork: a rank may connect while the store starts
    sys.stderr.flush()
    gc.freeze()  # a collection in a rank leaves the pages of these objects shared
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # one signal reaches every rank, or none of them is there yet
    pids: dict[int, int] = {}
    for index in range(world_size):
        pid = os.fork()
        if not pid:
            place = _place(index, world_size, listener.getsockname()[1])
            listener.close()
            os.environ.update(place)
            rank.end_with_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            return rank.main(logs, module, arguments)
        pids[pid] = index
    family = _Family(pids)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    store = _store(listener, world_size)  # kept until the last rank has ended
    code = family.watch()
    del store
    sys.stderr.flush()
    os._exit(code)  # taking torch's modules down again takes as long as importing some of them


class _Family:
    """The ranks, by process id."""

    def __init__(self, pids: Mapping[int, int]):
        self._alive = dict(pids)
        self._failed: dict[int, int] = {}  # rank -> exit code, in order
        self._signals = 0
        self._ending = False
        for number in _SIGNALS:
            signal.signal(number, self._hear)
        signal.signal(signal.SIGALRM, self._kill)

    def watch(self) -> int:
        """Wait for all of them; the first that fails ends the others. Returns the exit code of the launch."""
        while self._alive:
            pid, status = os.wait()
            index, code = self._alive.pop(pid, None), os.waitstatus_to_exitcode(status)
            if index is not None and code:
                self._failed[index] = code
                self._end()
        if self._failed:  # in the form of torchrun's table
            print("Root Cause (first observed failure):", file=sys.stderr)
        for place, (index, code) in enumerate(self._failed.items()):
            print(f"[{place}]:\n  rank      : {index}\n  exitcode  : {code}", file=sys.stderr)
        return 1 if self._failed else 0

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            self._send(number)
        else:
            self._end()

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            self._send(signal.SIGTERM)
            signal.alarm(SHUTDOWN_SECONDS)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for pid in self._alive:
            with contextlib.suppress(ProcessLookupError):  # reaped just now
                os.kill(pid, number)


def _import(modules: list[str]) -> None:
    """A module that fails here fails in each rank again, which reports it where launch/reason.py looks."""
    gc.disable()  # what imports make stays; looking for garbage among it takes a fifth of their time
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:
            traceback.print_exc()
    gc.enable()


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _store(listener: socket.socket, world_size: int) -> object:
    """Start the store where the ranks find each other, on this interface alone. It has a thread: no fork after it."""
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(HOST, port, world_size, True, wait_for_workers=False, master_listen_fd=listener.detach())


def _place(index: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for a rank of one machine."""
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


if __name__ == "__main__":
    code = main(int(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
