"""The run folder: can it be written to, is there room for the checkpoints, how fast is it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.errors import UserError
from owpo_megatron.launch.doctor.finding import Finding, Scope

MIN_GB, LOW_GB = 1.0, 10.0  # of a run that is not known
PROBE_MB = 64
SLOW_MB_S = 50.0
ELSEWHERE = "set runs_dir to a folder that can"
# A checkpoint's bytes for each parameter: fp32 master weights and Adam's two moments.
CHECKPOINT_BYTES = 12


def disk(scope: Scope) -> Iterator[Finding]:
    place = existing_parent(scope.runs_dir)
    free = shutil.disk_usage(place).free / 2**30
    try:
        written, read = _speed(place, min(PROBE_MB << 20, int(free * 2**30) // 4))
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


def existing_parent(folder: Path) -> Path:
    """The folder itself, or where it would be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _room(scope: Scope, free: float) -> Finding:
    detail = f"{_size(free)} free for {scope.runs_dir}"
    needed = _needed_gb(scope.config) if scope.config else None
    if needed is not None:
        told = f"{detail}; checkpoints take about {_size(needed)}"
        if free < needed:
            return Finding("disk", "fail", told, "free some space, lower checkpoint.keep, or set runs_dir elsewhere")
        return Finding("disk", "ok", told)
    if free < MIN_GB:
        return Finding("disk", "fail", detail, "free some space, or set runs_dir elsewhere")
    if free < LOW_GB:
        return Finding("disk", "warn", detail, "checkpoints of a large model may not fit: set runs_dir elsewhere")
    return Finding("disk", "ok", detail)


def _needed_gb(config: Config) -> float | None:
    """Checkpoints that a run keeps, one more while it writes, the reference beside each, and the exported model."""
    try:
        weights = sum(file.stat().st_size for file in weight_files(hf_folder(config.model.path), config.model.path))
    except UserError:
        return None  # the check of the model says so
    if not weights:
        return None
    parameters = weights / _bytes_a_parameter(config)
    checkpoint = parameters * CHECKPOINT_BYTES + 2 * weights
    copies = config.checkpoint.keep + 1
    return (checkpoint * copies + weights) / 2**30


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{gigabytes * 1024:.0f} MB"


def weight_files(files: Path, model: Path) -> list[Path]:
    """Files that hold weights: safetensors of an HF folder, or a converted folder's own."""
    return sorted(files.glob("*.safetensors")) or sorted(model.rglob("*.distcp"))


def _bytes_a_parameter(config: Config) -> int:
    """Checkpoints on disk are bf16 as a rule; a model that was saved in fp32 says so."""
    import json

    stored = json.loads((hf_folder(config.model.path) / "config.json").read_text())
    return 4 if "float32" in (stored.get("dtype"), stored.get("torch_dtype")) else 2


def _speed(place: Path, size: int) -> tuple[float, float]:
    """MB/s of writing (until it is on the disk) and of reading back (likely from memory)."""
    block = os.urandom(1 << 20)
    count = max(1, size >> 20)
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
