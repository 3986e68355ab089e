"""Why the ranks of a run ended: their error files, and the signals that ended them, as one line."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

HANG = "the run hangs: "  # in the error file of a rank whose watchdog ended the run (trainer/watchdog.py)
MISTAKE = "error: "  # prefix of an error file that reports a user's mistake (trainer/main.py)


@dataclass(frozen=True)
class Outcome:
    """End of the ranks.

    Example:
        Outcome(code=2, reason="parallel.tp = 3: use a divisor of ...", log=Path("runs/run/logs/error_rank_1.txt"))
    """

    code: int  # 0 done, 1 failure, 2 the user's mistake
    reason: str = ""
    log: Path | None = None  # file with the details
    stopped: bool = False  # on request


def why(code: int, world_size: int, logs: Path) -> Outcome:
    """The reason of an exit code other than 0: a user's mistake if there is one, else the first failure."""
    found = first_reason(logs, _killed_rank(code, world_size, logs))
    if found is None and code < 0:
        name = signal.Signals(-code).name
        what = f"the launcher was ended by {name}; its ranks finish their step, save it and end"
        return Outcome(1, what, _log_of(0, logs))
    return found or Outcome(1, f"the ranks ended with exit code {code}", _log_of(0, logs))


def first_reason(logs: Path, killed: tuple[int, int] | None = None) -> Outcome | None:
    """Return what the ranks' error files report; None where there is none.

    Args:
        killed: (rank, signal) where a signal ended one. Errors of other ranks are its consequence.
    """
    files = sorted(logs.glob("error_rank_*.txt"), key=lambda file: file.stat().st_mtime_ns)
    texts = {file: file.read_text(errors="replace") for file in files}
    for file, text in texts.items():
        if text.startswith(MISTAKE):
            return Outcome(2, text.removeprefix(MISTAKE).strip(), file)
    for file, text in texts.items():
        if HANG in text:  # the rank that was stopped had to be killed
            return Outcome(1, text.strip(), file)
    if killed is not None:
        rank, number = killed
        hint = "; the machine may have run out of memory" if number == signal.SIGKILL else ""
        return Outcome(1, f"rank {rank} was ended by {signal.Signals(number).name}{hint}", _log_of(rank, logs))
    for file, text in texts.items():
        lines = [line for line in text.splitlines() if line.strip()]
        return Outcome(1, f"rank {_rank_of(file)}: {lines[-1] if lines else 'no reason given'}", file)
    return None


def _killed_rank(code: int, world_size: int, logs: Path) -> tuple[int, int] | None:
    """(rank, signal) when a signal ended a rank: it leaves no error file, and the others fail because of it.

    The launcher ends the rest with SIGTERM once one has failed, so that one counts only as the first failure.
    """
    if world_size == 1:
        return (0, -code) if code < 0 else None
    text = (logs / "launcher.log").read_text(errors="replace")
    others, _, root = text.partition("Root Cause")
    # at the start of a line: the log above the table has "local_rank: 0", too
    entry = re.compile(r"^\s*rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL | re.MULTILINE)
    ended = [(int(rank), -int(exit_code)) for rank, exit_code in entry.findall(root) + entry.findall(others)]
    first, rest = ended[:1], [found for found in ended[1:] if found[1] != signal.SIGTERM]
    return next((found for found in first + rest if found[1] > 0), None)


def _log_of(rank: int, logs: Path) -> Path | None:
    for name in (f"rank_{rank}.log", "launcher.log"):
        if (logs / name).is_file() and (logs / name).stat().st_size:
            return logs / name
    return None


def _rank_of(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])
