"""The run folder: can it be written to, is there room for the checkpoints, how fast is it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from owpo_megatron.doctor.finding import Finding, Scope
from owpo_megatron.doctor.memory_needs import disk_bytes, plan_of, size
from owpo_megatron.engine.supervise import MAX_SOCKET_PATH, SOCKET_ROOM

MIN_BYTES, LOW_BYTES = 1 << 30, 10 << 30  # for a run that is not known
PROBE_BYTES = 64 << 20
SLOW_MB_S = 50.0
ELSEWHERE = "set runs_dir to a folder that can"


def disk(scope: Scope) -> Iterator[Finding]:
    place = existing_parent(scope.runs_dir)
    free = shutil.disk_usage(place).free
    try:
        written, read = _speed(place, min(PROBE_BYTES, free // 4))
    except OSError as error:
        yield Finding("disk", "fail", f"no file can be written in {place}: {error.strerror}", ELSEWHERE)
        return
    yield _room(scope, free)
    detail = f"{written:.0f} MB/s to disk, {read:.0f} MB/s back, at {place}"
    if written < SLOW_MB_S:
        remedy = "checkpoints will take long: a faster runs_dir, or a larger checkpoint.every"
        yield Finding("disk speed", "warn", detail, remedy)
    else:
        yield Finding("disk speed", "ok", detail)


def sockets(scope: Scope) -> Iterator[Finding]:
    """Whether TMPDIR leaves room for the names of an engine's sockets."""
    folder = tempfile.gettempdir()
    room = MAX_SOCKET_PATH - len(folder)
    if room >= SOCKET_ROOM:
        yield Finding("TMPDIR", "ok", f"{folder} leaves room for the names of sockets")
    else:
        detail = f"{folder} has {len(folder)} characters, too many for sockets in it (at most {MAX_SOCKET_PATH})"
        yield Finding("TMPDIR", "warn", detail, "set a shorter TMPDIR; engines use XDG_RUNTIME_DIR or /tmp meanwhile")


def existing_parent(folder: Path) -> Path:
    """The folder itself, or where it would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _room(scope: Scope, free: int) -> Finding:
    detail = f"{size(free)} free for {scope.runs_dir}"
    plan = plan_of(scope.config, gpu_bytes=0, cuda=False) if scope.config else None
    if scope.config is not None and plan is not None:
        needed = disk_bytes(scope.config, plan)
        detail += f"; checkpoints take about {size(needed)}"
        if free < needed:
            return Finding("disk", "fail", detail, "free some space, lower checkpoint.keep, or set runs_dir elsewhere")
        return Finding("disk", "ok", detail)
    if free < MIN_BYTES:
        return Finding("disk", "fail", detail, "free some space, or set runs_dir elsewhere")
    if free < LOW_BYTES:
        return Finding("disk", "warn", detail, "checkpoints of a large model may not fit: set runs_dir elsewhere")
    return Finding("disk", "ok", detail)


def _speed(place: Path, amount: int) -> tuple[float, float]:
    """MB/s of writing (until it is on the disk) and of reading back (likely from memory)."""
    block = os.urandom(1 << 20)
    count = max(1, amount >> 20)
    with tempfile.NamedTemporaryFile(prefix=".owpo-doctor-", dir=place) as file:
        began = time.perf_counter()
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        file.seek(0)
        began = time.perf_counter()
        while file.read(1 << 20):
            pass
        read = time.perf_counter() - began
    return count / written, count / read
