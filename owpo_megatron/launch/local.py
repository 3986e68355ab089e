"""Start a run's ranks on this machine, forward a stop to them, and report in one line why they failed.

        owpo train --- this process: signals, exit code, the one-line reason
          launcher            watches the ranks; its output goes to logs/launcher.log
            rank 0            stdout: the terminal; stderr: logs/rank_0.log; talks to the engine
            rank 1 ..         logs/rank_N.log

The launcher is torchrun where there are GPUs, and launch/forked.py on CPUs, which imports once for all ranks. A world
of one rank needs none and is started directly.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from owpo_megatron.launch.machine import usable_gpus
from owpo_megatron.launch.rank import end_with_parent
from owpo_megatron.launch.reason import Outcome, first_reason, why
from owpo_megatron.launched import own_environment
from owpo_megatron.run.heartbeat import Pulses, Stillness, pulse_file

_FORWARDED = (signal.SIGINT, signal.SIGTERM)
PORTS = range(12000, 20000)  # engines take 20000 to 32000 (engine/server.py)
_WATCH_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_FROZEN_MARGIN = 5.0  # seconds
SHUTDOWN_SECONDS = 20  # from the launcher's SIGTERM to its SIGKILL, once a rank has failed
_FORKED = "owpo_megatron.launch.forked"
_OURS = "owpo_megatron."
# What a rank of the trainer has imported by its first step, the larger part of it at least.
_IMPORTS = (
    "owpo_megatron.trainer.train",
    "transformers.configuration_utils",
    "transformers.models.auto.auto_factory",
    "transformers.tokenization_utils_tokenizers",
)


def run_ranks(
    arguments: Sequence[str],
    world_size: int,
    logs: Path,
    module: str,
    notify: Callable[[str], None] = print,
    lock: int | None = None,
    watch: Callable[[], bool] | None = None,
    echo: Callable[[str], object] | None = None,
) -> Outcome:
    """Run `module` with these arguments on every rank, until all have ended.

    SIGINT and SIGTERM go to the ranks, which finish their step and save; a second one ends them at once. With `watch`,
    signals keep their handlers, and a KeyboardInterrupt in this thread does the same.

    Args:
        logs: folder for the ranks' logs and error files. Error files of an earlier attempt are removed; its logs are
            kept as NAME.log.1.
        notify: called with a message on each signal.
        lock: file descriptor of the run folder's lock. The ranks inherit it, so that the folder stays locked until they
            have ended even if this process is killed.
        watch: called a few times per second; once it returns True, the ranks finish their step and save.
        echo: receives what rank 0 prints; None: it prints on this process's own standard output.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for stale in logs.glob("error_rank_*.txt"):
        stale.unlink()
    for earlier in [*logs.glob("rank_*.log"), *logs.glob("launcher.log")]:
        earlier.replace(earlier.with_name(f"{earlier.name}.1"))  # a log begins with its own attempt
    for stale in logs.glob(pulse_file(logs, 0).name.replace("0", "*")):
        stale.unlink()
    pulses = Pulses(logs, range(world_size), every=_LOOK_SECONDS)
    command = rank_command(world_size, logs, module, arguments)
    with (logs / "launcher.log").open("wb") as launcher_log:  # one rank: its output before its log is open
        process = subprocess.Popen(
            command,
            env=rank_environment(world_size),
            stdout=None if echo is None else subprocess.PIPE,
            stderr=launcher_log,
            start_new_session=True,  # the terminal's Ctrl-C reaches this process only, which forwards it below
            preexec_fn=end_with_parent,  # safe: this process has no threads
            pass_fds=() if lock is None else (lock,),
        )
        stop = _Stop(process, world_size, notify)
        with _echoed(process, echo), _forwarded(stop) if watch is None else contextlib.nullcontext():
            try:
                code = _watched(process, watch or _never, stop, pulses)
            finally:
                _kill_tree(process)  # leave no process behind, however this ends
    if code == 0:
        return Outcome(0, stopped=stop.asked > 0)
    if stop.frozen:
        return first_reason(logs) or Outcome(1, stop.frozen, logs)
    if stop.asked:
        return Outcome(1, "stopped before the step was saved", stopped=True)
    return why(code, world_size, logs)


def rank_environment(world_size: int) -> dict[str, str]:
    """This environment plus the variables that every rank needs; variables that are set already win."""
    env = own_environment()
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if usable_gpus():
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron's overlap of communication relies on it
        env.setdefault("NCCL_CUMEM_ENABLE", "0")  # as SGLang sets it in its engines: both ends of a group must agree
    else:
        env.setdefault("OMP_NUM_THREADS", "1")
        env.setdefault("TORCHDYNAMO_DISABLE", "1")  # on a CPU compilation takes longer than it saves
    return env


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free now, below the range that systems give to outgoing connections.

    torchrun listens on it seconds later; a port of that range may be taken by then.
    """
    for port in random.sample(PORTS, 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    raise RuntimeError(f"none of a hundred ports from {PORTS.start} to {PORTS.stop} is free on {host}")


def rank_command(world_size: int, logs: Path, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs `module` on every rank."""
    if world_size == 1:
        return [sys.executable, "-m", "owpo_megatron.launch.rank", str(logs), module, *arguments]
    if usable_gpus() or not sys.platform.startswith("linux"):
        return torchrun_command(world_size, logs, module, arguments)
    imports = _IMPORTS if module.startswith(_OURS) else ("torch",)
    return [sys.executable, "-m", _FORKED, str(world_size), ",".join(imports), str(logs), module, *arguments]


def torchrun_command(world_size: int, logs: Path, module: str, arguments: Sequence[str]) -> list[str]:
    """The same by torchrun."""
    return [
        *(sys.executable, "-m", "owpo_megatron.launch.torchrun"),
        f"--nproc-per-node={world_size}",
        *("--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={free_port()}"),
        *("--rdzv-backend=static", f"--shutdown-timeout={SHUTDOWN_SECONDS}"),
        f"--log-dir={os.devnull}",  # else an empty folder in /tmp for each attempt; ranks have logs of their own
        *("-m", "owpo_megatron.launch.rank", str(logs), module, *arguments),
    ]


@dataclass
class _Stop:
    """Requests to stop, each more urgent than the one before."""

    process: subprocess.Popen[bytes]
    world_size: int
    notify: Callable[[str], None]
    asked: int = 0
    deadline: float = math.inf  # of time.monotonic: those that still run then are killed
    frozen: str = ""  # why all ranks were ended: they showed no sign of life

    def ask(self, number: int = signal.SIGINT) -> None:
        self.asked += 1
        if self.asked == 1:
            self.notify("stopping: a step under way is finished and saved (again: do not wait for it)")
            _signal_ranks(self.process, self.world_size, number)
        elif self.asked == 2:
            self.notify(f"stopping within {SHUTDOWN_SECONDS} s (again: kill)")
            self.deadline = time.monotonic() + SHUTDOWN_SECONDS  # a rank only notes a signal, and finishes its step
            self.process.terminate()
        else:
            _kill_tree(self.process)


@contextmanager
def _forwarded(stop: _Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a stop inside the block."""

    def forward(number: int, frame: FrameType | None) -> None:
        stop.ask(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _never() -> bool:
    return False


def _watched(process: subprocess.Popen[bytes], watch: Callable[[], bool], stop: _Stop, pulses: Pulses) -> int:
    """Wait for the end, asking `watch` in between, and end ranks none of which shows a sign of life."""
    next_look = time.monotonic()
    while True:
        try:
            if not stop.asked and watch():
                stop.ask()
            if time.monotonic() >= next_look and not stop.frozen:
                next_look = time.monotonic() + _LOOK_SECONDS
                stop.frozen = frozen_ranks(pulses.look())
                if stop.frozen:
                    _kill_tree(process)
            if time.monotonic() >= stop.deadline:
                _kill_tree(process)
            return process.wait(_WATCH_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            stop.ask()


@contextmanager
def _echoed(process: subprocess.Popen[bytes], echo: Callable[[str], object] | None) -> Iterator[None]:
    """Rank 0's output goes to `echo` line by line; all of it has arrived when the block ends."""
    if echo is None:
        yield
        return

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                echo(line.decode(errors="replace"))

    reader = threading.Thread(target=read, name="rank-0-output", daemon=True)
    reader.start()
    try:
        yield
    finally:
        reader.join(SHUTDOWN_SECONDS)


def frozen_ranks(found: Mapping[int, Stillness]) -> str:
    """The reason to end ranks that do not run any more, so that their own watchdogs do not either; "" where one does.

    They get a margin over their own limit, within which one that still runs would have ended the run.
    """
    limits = [one.pulse.limit for one in found.values() if one.pulse.limit]
    if not limits or any(one.tick_seconds <= 2 * max(limits) + _FROZEN_MARGIN for one in found.values()):
        return ""
    seconds = min(one.tick_seconds for one in found.values())
    return f"no rank has shown a sign of life for {seconds:.0f} s (stopped, or their disk hangs)"


def _signal_ranks(process: subprocess.Popen[bytes], world_size: int, number: int) -> None:
    """Signal torchrun's ranks directly: it would end them after its timeout, in the middle of a step."""
    import psutil  # here: `owpo doctor` must start where it is missing

    if world_size == 1:
        process.send_signal(number)
        return
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
        launcher = psutil.Process(process.pid)
        ranks = [] if _FORKED in launcher.cmdline() else launcher.children()
        if not ranks:  # the launcher passes it on, or torchrun has not started them yet
            process.send_signal(number)
        for rank in ranks:
            rank.send_signal(number)


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    import psutil

    if process.poll() is not None:
        return
    tree = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in tree:
        if child.is_running():
            child.kill()
