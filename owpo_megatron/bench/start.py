"""owpo bench start: seconds and CPU seconds from `owpo train` to its first finished step, by kind of process."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from owpo_megatron.bench.processes import cpu_seconds
from owpo_megatron.bench.step import Log
from owpo_megatron.bench.step_side import ended
from owpo_megatron.bench.step_workload import Workload, run_config, write_workload
from owpo_megatron.errors import RunError

POLL_SECONDS = 0.02
PATIENCE = 600.0  # seconds


def bench_start(workload: Workload, ranks: int, rounds: int, log: Log) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Start a run with an engine of its own and one with a warm engine, in turn.

    Args:
        ranks: data-parallel ranks of the trainer.
        rounds: runs of each; results are medians.

    Returns:
        (rows, figures): CPU seconds by kind of process and seconds until the first step has ended, with an engine of
        its "own" and a "warm" one.

    Raises:
        RunError: a run ended before its first step.
    """
    found: dict[str, list[dict[str, float]]] = {"own": [], "warm": []}
    with TemporaryDirectory(prefix="owpo-start-") as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        write_workload(folder, workload)
        # The first step is the only one that counts; a few more, so that it ends while every process is there.
        raw = run_config(folder, workload, steps=4, ranks=ranks) | {"runs_dir": str(folder / "runs")}
        config = folder / "config.json"
        config.write_text(json.dumps(raw))
        log("warming an engine")
        stack.enter_context(_warm_engine(config))
        for number in range(rounds):
            for name, values in found.items():
                log(f"round {number + 1} of {rounds}: a run with {name} engine")
                values.append(_start(folder, config, f"{name}{number}", name == "warm"))
    medians = {name: _medians(values) for name, values in found.items()}
    seconds = {name: median.pop("seconds") for name, median in medians.items()}
    kinds = sorted({kind for median in medians.values() for kind in median})
    rows = [_row(kind, {name: median.get(kind, 0.0) for name, median in medians.items()}) for kind in kinds]
    rows.append(_row("all", {name: sum(median.values()) for name, median in medians.items()}))
    rows.append({"what": "until the first step has ended, seconds", **seconds})
    return rows, {f"{name}_seconds": value for name, value in seconds.items()}


def _medians(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = sorted({name for one in values for name in one})
    return {name: statistics.median(one.get(name, 0.0) for one in values) for name in names}


def _row(process: str, cpu: Mapping[str, float]) -> dict[str, Any]:
    return {"what": f"{process}, CPU seconds", **cpu}


def _start(folder: Path, config: Path, name: str, warm: bool) -> dict[str, float]:
    """Seconds until the first step of a run is written, and CPU seconds until then by kind of process."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    started = time.monotonic()
    process = _owpo(folder, ["train", "-c", str(config), f"name={name}", f"engine.warm={str(warm).lower()}"])
    with ended(process):
        _wait(process, lambda: metrics.is_file() and b"\n" in metrics.read_bytes(), folder)
        return {"seconds": time.monotonic() - started} | cpu_seconds(process.pid)


@contextlib.contextmanager
def _warm_engine(config: Path) -> Iterator[None]:
    folder = config.parent
    process = _owpo(folder, ["serve", "-c", str(config), "--warm"])
    with ended(process):
        _wait(process, lambda: any((folder / "runs" / ".engines").glob("*/engine_0.json")), folder)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _owpo(folder: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "owpo_megatron.cli.main", *arguments]
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
            raise RunError(f"no first step: {lines[-1] if lines else 'no output'}")
        time.sleep(POLL_SECONDS)
