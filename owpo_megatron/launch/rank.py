"""What `owpo train` starts on every rank: the trainer, with its streams in order and the reason of its end on disk.

    python -m owpo_megatron.launch.rank LOGS_DIR owpo_megatron.trainer.main [its arguments]

Rank 0's stdout is the terminal; every other stream goes to LOGS_DIR/rank_N.log. After an error the reason stands in
LOGS_DIR/error_rank_N.txt, where launch/local.py finds it: `error: field = value: remedy` for a user's mistake, else a
traceback. The trainer writes that file itself; what never reaches it (an import that fails) is written here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

from owpo_megatron.errors import UserError


def main(logs: Path, module: str, arguments: list[str]) -> int:
    """Run `module` as `python -m` would, with these arguments; returns its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    logs.mkdir(parents=True, exist_ok=True)
    end_with_parent()
    _keep_descriptors()
    _write_streams_to(logs / f"rank_{rank}.log", streams=(2,) if rank == 0 else (1, 2))
    return _run(module, arguments, logs / f"error_rank_{rank}.txt")


def _run(module: str, arguments: list[str], error_file: Path) -> int:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except UserError as error:
        error_file.write_text(f"error: {error}\n")
        return 2
    except Exception:
        error_file.write_text(traceback.format_exc())
        traceback.print_exc()
        return 1
    return 0


def _write_streams_to(log: Path, streams: tuple[int, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in streams:
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _keep_descriptors() -> None:
    """The launcher's lock is for this process: torch's shared-memory manager, which outlives it a little, would hold it
    on, and the next command would find the folder taken."""
    for descriptor in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if int(descriptor) > 2:
                os.set_inheritable(int(descriptor), False)


def end_with_parent() -> None:
    """On Linux: be told to stop when the launcher dies, so that no rank is left behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
