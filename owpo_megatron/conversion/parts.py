"""The work of a conversion in parts, on several threads; what an interrupted attempt finished is not done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from owpo_megatron.conversion.unfinished import Unfinished
from owpo_megatron.families import HFModel, hf_parts, megatron_names

Stage = Callable[[str], Callable[[int, int], None]]  # "convert" or "prove" -> where to report (done, total)
Record = TypeVar("Record")
_PART_BYTES = 256 * 2**20  # what an interrupted attempt does again at most, for each thread


def each_part(
    model: HFModel,
    dtype: torch.dtype,
    work: Unfinished,
    write: Callable[[int, list[str]], Record],
    still_there: Callable[[Record], bool],
    stage: Stage | None,
    jobs: int | None,
) -> list[Record]:
    """Return `write`'s result for every part; parts that an earlier attempt finished are not written again."""
    parts = list(_parts(model, dtype))
    progress = stage("convert") if stage else None

    def one(numbered: tuple[int, list[str]]) -> Record:
        number, names = numbered
        record = work.record(str(number))
        if record is None or not still_there(record):
            record = write(number, names)
            work.mark(str(number), record)
        return record

    pool = ThreadPoolExecutor(threads(jobs))
    try:
        records, done = [], 0
        for record, names in zip(pool.map(one, enumerate(parts)), parts, strict=True):
            records.append(record)
            done += len(names)
            if progress:
                progress(done, sum(map(len, parts)))
        return records
    finally:
        pool.shutdown(cancel_futures=True)


def _parts(model: HFModel, dtype: torch.dtype) -> Iterator[list[str]]:
    """Megatron names in groups of about `_PART_BYTES`."""
    group: list[str] = []
    size = 0
    for name in megatron_names(model):
        own = sum(torch.Size(shape).numel() for shape in hf_parts(model, name).values()) * dtype.itemsize
        if group and size + own > _PART_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    yield group


def threads(jobs: int | None) -> int:
    """Number of threads to use; None: one per core."""
    return jobs or len(os.sched_getaffinity(0))
