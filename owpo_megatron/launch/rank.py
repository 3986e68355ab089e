"""Entry point of every rank that `owpo train` starts: redirects its streams and records why it failed.

    python -m owpo_megatron.launch.rank LOGS_DIR owpo_megatron.trainer.main [its arguments]

The process is called owpo-rank-N. Rank 0's stdout is the terminal; every other stream goes to LOGS_DIR/rank_N.log.
After an error the reason is in LOGS_DIR/error_rank_N.txt, where launch/local.py reads it: `error: field = value:
remedy` for a user's mistake, else a traceback. The trainer writes that file itself; errors that never reach it (a
failing import) are written here.

Until the trainer takes over SIGTERM and SIGINT, either ends the rank quietly with exit code 0: nothing is lost yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import runpy
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from owpo_megatron.errors import UserError

PROCESS_NAME = "owpo-rank-"  # and the rank: what `ps -o comm` and `top` show
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def main(logs: Path, module: str, arguments: list[str]) -> int:
    """Run `module` as `python -m` would, with these arguments; returns its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    logs.mkdir(parents=True, exist_ok=True)
    end_with_parent()
    _prctl(_PR_SET_NAME, f"{PROCESS_NAME}{rank}".encode())  # of forked ranks the command lines are the same
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end_before_the_start)
    _keep_descriptors()
    _write_streams_to(logs / f"rank_{rank}.log", streams=(2,) if rank == 0 else (1, 2))
    sys.stdout = _terminal()
    _shorten_temporary_folder()
    return _run(module, arguments, logs / f"error_rank_{rank}.txt")


def end_before_the_start(number: int, frame: FrameType | None) -> None:
    """No cleanup: an engine under way dies with this process, and waiting for its start would take a minute."""
    os._exit(0)


def _run(module: str, arguments: list[str], error_file: Path) -> int:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except UserError as error:
        error_file.write_text(f"error: {error}\n")
        return 2
    except SystemExit:
        raise
    except BaseException:  # torch's CheckpointException is no Exception
        error_file.write_text(traceback.format_exc())
        traceback.print_exc()
        return 1
    return 0


def _write_streams_to(log: Path, streams: tuple[int, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in streams:
        os.dup2(descriptor, stream)
    os.close(descriptor)


class _Output(io.FileIO):
    """Standard output that goes nowhere once nobody reads it: a run does not end with `| head` or a terminal."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return super().write(data)


def _terminal() -> io.TextIOWrapper:
    """Standard output as before, which also bears characters that the terminal's encoding lacks."""
    raw = io.BufferedWriter(_Output(1, "w", closefd=False))
    return io.TextIOWrapper(raw, sys.stdout.encoding, errors="replace", write_through=True, line_buffering=True)


def _keep_descriptors() -> None:
    """Keep the launcher's lock from child processes: torch's shared-memory manager outlives this one a little, and the
    next command would find the folder locked."""
    for descriptor in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            if int(descriptor) > 2:
                os.set_inheritable(int(descriptor), False)


def _shorten_temporary_folder() -> None:
    """Leave a TMPDIR that is too long for sockets: torch's shared-memory manager has one there, too."""
    from owpo_megatron.engine.supervise import short_folder  # not before signals are handled

    folder = short_folder()
    if folder is not None:
        os.environ["TMPDIR"] = folder
        tempfile.tempdir = None  # read anew


def end_with_parent() -> None:
    """Get SIGTERM when the launcher dies, so that no rank is left behind. Linux only."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
