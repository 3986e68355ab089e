"""owpo runs"""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, err, out, wide
from owpo_megatron.errors import UserError, one_line

_COLORS = {
    "running": "green",
    "finished": "",
    "stopped": "yellow",
    "failed": "red",
    "not started": "dim",
    "unreadable": "red",
}


@dataclass(frozen=True)
class RunState:
    """A row of the table.

    Example:
        RunState("quickstart", "runs/quickstart", "finished", "owpo", 36, 36, 0.632, "pass@1 16.0 % -> 100.0 %", 120.0)
    """

    name: str
    folder: str
    status: str
    method: str
    step: int
    steps: int | None
    reward: float | None  # of the newest step
    score: str
    age: float  # seconds since it last wrote something


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="FOLDER", help="Folders to search; default: runs.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List runs with their status, step, reward and scores, newest first.

    Status: running (a process holds the run folder), finished, failed, stopped (it resumes by the same `owpo train`).

    Example: owpo runs
    """
    roots = folders or [Path("runs")]
    for root in roots:
        if not root.is_dir():
            raise UserError("FOLDER", root, "no such folder; give the folder that holds run folders, e.g. runs")
    found = sorted((_listed(folder) for root in roots for folder in _run_folders(root)), key=lambda one: one.age)
    if not found:
        out.print(f"no runs in {escape(', '.join(map(str, roots)))}; start one with owpo quickstart")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in ("run", "status", "method", "step", "reward", "score", "last written"):
        table.add_column(
            column,
            justify="right" if column in ("step", "reward") else "left",
            no_wrap=column != "run",
            overflow="fold",
        )
    for one in found:
        color = _COLORS[one.status]
        table.add_row(
            escape(one.folder),
            f"[{color}]{one.status}[/{color}]" if color else one.status,
            one.method,
            f"{one.step}/{one.steps}" if one.steps else str(one.step),
            "" if one.reward is None else f"{one.reward:.3f}",
            one.score,
            _ago(one.age),
        )
    wide().print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


def _listed(folder: Path) -> RunState:
    """The state of a run; one whose files cannot be read does not hide the others."""
    try:
        return state_of(folder)
    except (UserError, OSError) as error:  # also another user's, which they keep to themselves
        err.print(f"[yellow]note:[/yellow] {escape(one_line(error))}")
        return RunState(folder.name, str(folder), "unreadable", "", 0, None, None, "", 0.0)


def state_of(folder: Path) -> RunState:
    """The state of a run, from its folder alone."""
    from owpo_megatron.run.layout import RunFolder
    from owpo_megatron.run.metrics_reader import read_run

    run = RunFolder(folder)
    metrics: Any = read_run(folder) if run.metrics.is_file() else None
    steps = metrics.steps if metrics else []
    written = [file.stat().st_mtime for file in (run.metrics, run.config, run.summary) if file.is_file()]
    return RunState(
        folder.name,
        str(folder),
        _status(run, has_steps=bool(steps)),
        str(metrics.setting("algorithm.name", "")) if metrics else "",
        steps[-1]["step"] if steps else 0,
        metrics.setting("optimizer.steps") if metrics else None,
        steps[-1].get("reward_mean") if steps else None,
        _score(metrics) if metrics else "",
        max(0.0, time.time() - max(written, default=time.time())),
    )


def _run_folders(root: Path) -> list[Path]:
    """Run folders in a folder, and in the folders of comparisons below it."""
    from owpo_megatron.run.layout import CONFIG, RunFolder

    if RunFolder(root).config.is_file():
        return [root]
    return sorted({file.parent for pattern in ("*", "*/runs/*") for file in root.glob(f"{pattern}/{CONFIG}")})


def _status(run: Any, has_steps: bool) -> str:
    if _is_locked(run.lock):
        return "running"
    if run.is_finished:
        return "finished"
    if any(run.logs.glob("error_rank_*.txt")):
        return "failed"
    return "stopped" if has_steps or run.has_checkpoints() else "not started"


def _is_locked(lock: Path) -> bool:
    if not lock.is_file():
        return False
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:  # another user's; Linux lists the locks of all
        with suppress(OSError):
            inode = str(lock.stat().st_ino)
            held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
            return any("FLOCK" in entry and any(one.endswith(f":{inode}") for one in entry) for entry in held)
    return False


def _score(metrics: Any) -> str:
    parts = []
    for name in metrics.eval_fields():
        values = metrics.eval_column(name).values
        ends = [f"{100 * values[0]:.1f} %"] + ([f"{100 * values[-1]:.1f} %"] if len(values) > 1 else [])
        parts.append(f"{name} {' -> '.join(ends)}")
    return ", ".join(parts)


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
