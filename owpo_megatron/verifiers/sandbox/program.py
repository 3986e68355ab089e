"""Run one program in the sandbox and collect what it wrote and how it ended."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from pathlib import Path
from typing import Any, Literal

from owpo_megatron.verifiers.sandbox import jail
from owpo_megatron.verifiers.sandbox.limits import Isolation, Limits
from owpo_megatron.verifiers.sandbox.syscalls import seccomp_program

PYTHON = sys.executable
"""The interpreter that is visible inside, with its packages."""

Reason = Literal["exit", "signal", "timeout", "memory", "processes", "output", "refused"]

SETUP_SECONDS = 60.0  # for the jail itself, on a machine that is busy
END_SECONDS = 5.0  # for the kernel to end everything, after which it is reported
USAGE_SECONDS = 0.05  # between two looks at what all processes use together
READ_BYTES = 65536
PAGE_BYTES, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": jail.BOX,
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # the same order of a set in every run
}
LIBRARIES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/alternatives")


@dataclass(frozen=True)
class Outcome:
    """End of a program.

    Attributes:
        reason: `exit` and `signal` are its own end (a signal may be that of a file's size);
            `timeout`, `memory`, `processes` and `output` name the limit for which all of it was killed; `refused`: it
            did not start.
        code: exit status, or the number of the signal; None after a limit.
        stdout, stderr: up to the limit, whatever the reason.
        detail: why it did not start.
        seconds: from its start to its end.
        cpu_seconds: CPU time of its processes that ended by themselves.
    """

    reason: Reason
    code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    detail: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, with status 0."""
        return self.reason == "exit" and self.code == 0


def run(
    argv: Sequence[str],
    files: Mapping[str, bytes | str] | None = None,
    stdin: bytes = b"",
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
    readable: Sequence[Path] = (),
) -> Outcome:
    """Run a program to its end, or to the first limit that it exceeds. Nothing of it runs afterwards.

    Safe to call from several threads. Costs about 50 ms beside the program.

    Args:
        argv: the command; programs of /usr and `PYTHON` are there.
        files: contents by relative path; they lie in its working folder, where it may write.
        stdin: what it reads.
        isolation: `namespaces`: no network, no files but those of the system, the interpreter and its own, no other
            processes. `process`: the limits, and no further processes.
        readable: further folders that it may read, by the same path.

    Raises:
        ValueError: a name in `files` leads out of the folder.
    """
    limits = limits or Limits()
    contents = {_inside(name): _bytes(value).decode("latin-1") for name, value in (files or {}).items()}
    with ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="owpo-sandbox-", ignore_cleanup_errors=True))
        order = {
            "argv": list(argv),
            "env": ENVIRONMENT if isolation == "namespaces" else {**ENVIRONMENT, "HOME": root},
            "files": contents,
            "isolation": isolation,
            "limits": asdict(limits),
            "filter": seccomp_program(may_fork=isolation == "namespaces").hex(),
            "root": root,
            **_visible(readable),
        }
        run = _Run(limits, isolation)
        stack.callback(run.close)
        run.start(json.dumps(order).encode(), stdin)
        return run.outcome()


class _Run:
    """The parent's side of one jail: its pipes, and the limits that only an observer can hold."""

    def __init__(self, limits: Limits, isolation: Isolation):
        self.limits = limits
        self.jails = 1 if isolation == "namespaces" else 0  # processes between the jail and the program
        self.written: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
        self.broken: Reason | None = None
        self.started = False
        self.since = time.monotonic()

    def start(self, order: bytes, stdin: bytes) -> None:
        order_fd, stdin_fd = _sealed("order", order), _sealed("stdin", stdin)
        self.report, theirs = os.pipe()
        lifeline, self.lifeline = os.pipe()
        given = (order_fd, theirs, lifeline)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-E", "-s", "-S", "-B", jail.__file__, *map(str, given)],
                stdin=stdin_fd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=given,
                env={},
            )
        finally:
            for descriptor in (*given, stdin_fd):
                os.close(descriptor)

    def outcome(self) -> Outcome:
        assert self.process.stdout is not None and self.process.stderr is not None
        with selectors.DefaultSelector() as selector:
            for name, source in (
                ("stdout", self.process.stdout.fileno()),
                ("stderr", self.process.stderr.fileno()),
                ("report", self.report),
            ):
                os.set_blocking(source, False)
                selector.register(source, selectors.EVENT_READ, name)
            while selector.get_map() and not self._late():
                for key, _ in selector.select(USAGE_SECONDS):
                    if not self._read(key.fd, key.data):
                        selector.unregister(key.fd)
                if self.broken is None and (reason := self._exceeded()) is not None:
                    self._end(reason)
        return self._judge()

    def close(self) -> None:
        """End the jail, whatever happened; idempotent."""
        self._cut()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in (*jail.descendants(self.process.pid), self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        os.close(self.report)

    def _read(self, source: int, name: str) -> bool:
        """Take what a pipe has; False at its end."""
        chunk = os.read(source, READ_BYTES)
        room = self.limits.output_bytes - len(self.written[name]) if name != "report" else READ_BYTES
        self.written[name] += chunk[: max(0, room)]
        if len(chunk) > room and self.broken is None:
            self._end("output")
        if name == "report" and not self.started and b'"started"' in self.written["report"]:
            self.started, self.since = True, time.monotonic()
        return bool(chunk)

    def _exceeded(self) -> Reason | None:
        if time.monotonic() - self.since > (self.limits.seconds if self.started else SETUP_SECONDS):
            return "timeout"
        if not self.started:
            return None
        processes = jail.descendants(self.process.pid)[self.jails :]
        if len(processes) > self.limits.processes:
            return "processes"
        used = [_usage(pid) for pid in processes]
        if sum(usage[1] for usage in used) > self.limits.memory_bytes:
            return "memory"
        if self.limits.cpu_seconds is not None and sum(usage[0] for usage in used) > self.limits.cpu_seconds:
            return "timeout"
        return None

    def _end(self, reason: Reason) -> None:
        self.broken, self.ended = reason, time.monotonic()
        self._cut()

    def _cut(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

    def _late(self) -> bool:
        return self.broken is not None and time.monotonic() - self.ended > END_SECONDS

    def _judge(self) -> Outcome:
        stdout, stderr = bytes(self.written["stdout"]), bytes(self.written["stderr"])
        if self.broken is not None:
            return Outcome(self.broken, None, stdout, stderr, seconds=self.ended - self.since)
        report: dict[str, Any] = {}
        for line in self.written["report"].splitlines():
            report |= json.loads(line)
        if "code" not in report:
            why = report.get("refused") or stderr.decode(errors="replace")[-300:] or "the jail itself was killed"
            return Outcome("refused", None, stdout, stderr, detail=why)
        code, seconds, cpu_seconds = report["code"], report["seconds"], report["cpu_seconds"]
        return Outcome("signal" if code < 0 else "exit", abs(code), stdout, stderr, "", seconds, cpu_seconds)


def _visible(readable: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Folders and links of the new root: libraries, the interpreter, and what the caller adds."""
    folders: dict[str, str] = {}
    links: dict[str, str] = {}
    for path in (*map(Path, LIBRARIES), Path(sys.base_prefix), Path(sys.prefix), *readable):
        if path.is_symlink() and str(path) in LIBRARIES:
            links[str(path)] = os.readlink(path)
        elif path.exists() and not any(str(path).startswith(f"{known}/") for known in folders):
            folders[os.path.abspath(path)] = str(path.resolve())
    return {"folders": folders, "links": links}


def _sealed(name: str, content: bytes) -> int:
    """A file in memory that nobody can change, at its start."""
    descriptor = os.memfd_create(f"owpo-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl(descriptor, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK)
    return descriptor


def _usage(pid: int) -> tuple[float, int]:
    """CPU seconds of a process and of those that it waited for, and its resident bytes; zeros when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0
    return sum(map(int, fields[11:15])) / TICKS, int(fields[21]) * PAGE_BYTES


def _inside(name: str) -> str:
    if os.path.isabs(name) or ".." in Path(name).parts or not Path(name).parts:
        raise ValueError(f"{name!r} is no path inside the sandbox's folder")
    return name


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value
