"""What `owpo train` starts on every rank: the trainer, with its streams and its end in order.

    python -m owpo_megatron.launch.rank LOGS_DIR owpo_megatron.trainer.main [its arguments]

Rank 0 keeps the terminal; the others write to LOGS_DIR/rank_N.log. Every rank leaves its exit code in
LOGS_DIR/exit_rank_N.txt and, after an error, the reason in LOGS_DIR/error_rank_N.txt (first line: the reason; then the
traceback), where launch/local.py finds them.
"""

from __future__ import annotations

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
    _end_with_parent()
    if rank > 0:
        _write_streams_to(logs / f"rank_{rank}.log")
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        os.dup2(1, 2)  # stderr is torchrun's, which goes to a file
    code = _run(module, arguments, logs / f"error_rank_{rank}.txt")
    (logs / f"exit_rank_{rank}.txt").write_text(f"{code}\n")
    return code


def _run(module: str, arguments: list[str], error_file: Path) -> int:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        _record(error_file, str(end.code))
        return 1
    except UserError as error:
        _record(error_file, str(error))
        return 2
    except BaseException as error:  # the reason must reach the launcher, whatever it is; the code says failure
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        _record(error_file, f"{reason}\n\n{traceback.format_exc()}")
        return 1
    return 0


def _record(error_file: Path, text: str) -> None:
    if not error_file.exists():
        error_file.write_text(text.rstrip() + "\n")


def _write_streams_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _end_with_parent() -> None:
    """On Linux: be told to stop when the launcher dies, so that no rank is left behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
