"""Run a command in its own process group and kill the group when standard input closes.

    python supervise.py COMMAND ARGUMENT...

The parent holds the other end of standard input: however it dies, even by SIGKILL, the pipe closes. (PR_SET_PDEATHSIG
in the command itself would be tied to the parent's starting *thread* and would miss the command's own children.) The
command's temporary files go to a folder that is removed afterwards, as is what it left in shared memory. Standard
library only. The exit status is the command's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_SOCKET_PATH = 107  # characters: sun_path of a Unix socket
SHARED_MEMORY = "/dev/shm"
LEFT_BEHIND = "sglang_loads_"  # SGLang's snapshots of its load; the names hold no process id
SOCKET_ROOM = 48  # of them for our folder and the names of files in it


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the group has already exited


def _reap() -> None:
    """Reap orphaned descendants; the first process of a container may not do it."""
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass  # no child is left


def _sweep(since: float) -> None:
    """Remove what the killed command left in shared memory.

    A file goes if it is this user's, was made after `since` (seconds of the epoch), and no process has it open or
    mapped: it is not another engine's.
    """
    left = set()
    for name in os.listdir(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else ():
        path = os.path.join(SHARED_MEMORY, name)
        if name.startswith(LEFT_BEHIND):
            with contextlib.suppress(OSError):
                facts = os.stat(path)
                if facts.st_uid == os.getuid() and facts.st_ctime >= since:
                    left.add(path)
    for pid in filter(str.isdigit, os.listdir("/proc")) if left else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            with open(f"/proc/{pid}/maps") as file:
                left -= {line.split(maxsplit=5)[-1].strip() for line in file if SHARED_MEMORY in line}
            left -= {os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    for path in left:
        with contextlib.suppress(OSError):
            os.unlink(path)


def short_folder() -> str | None:
    """A folder for temporary files whose path leaves room for a socket's name; None: the usual one.

    The name of a socket in the file system has at most 107 characters. Job schedulers set a TMPDIR that is longer.
    """
    usual = tempfile.gettempdir()
    folders = (usual, os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp", "/dev/shm")
    for folder in folders:
        if folder and len(folder) + SOCKET_ROOM <= MAX_SOCKET_PATH and os.access(folder, os.W_OK | os.X_OK):
            return None if folder == usual else folder
    return None


def main(command: list[str]) -> int:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    temporary = tempfile.mkdtemp(prefix="owpo-engine-", dir=short_folder())
    started = os.stat(temporary).st_ctime  # by the clock of files, which is up to 10 ms behind time.time()
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": temporary},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

        def watch() -> None:
            sys.stdin.buffer.read()
            _kill(child.pid)

        threading.Thread(target=watch, daemon=True).start()
        status = child.wait()
        _kill(child.pid)
        _reap()
        _sweep(started)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    # os._exit: the watcher thread still reads standard input
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)
