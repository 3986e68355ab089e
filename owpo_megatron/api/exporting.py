"""Weights of any kind as an HF folder, for as long as something needs it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from owpo_megatron.errors import UserError


@contextmanager
def as_hf(weights: Path, scratch: Path) -> Iterator[Path]:
    """The HF folder of an HF folder (itself), a converted folder or a run's checkpoint (made in `scratch`, removed).

    Raises:
        UserError: it is none of them, or not whole.
    """
    if (weights / "config.json").is_file():
        yield weights
        return
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        _export(weights, scratch)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _export(weights: Path, out: Path) -> None:
    """Export in a separate process, so that this one loads neither torch nor megatron while the engine works."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        mistake = pool.submit(_export_here, weights, out).result()
    if mistake is not None:
        raise UserError(*mistake)


def _export_here(weights: Path, out: Path) -> tuple[str, str, str] | None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the model stays in host memory, wherever this runs
    from owpo_megatron.conversion.export import megatron_to_hf

    try:
        megatron_to_hf(weights, out, proof=False)  # for as long as an engine serves it
    except UserError as error:
        return error.field, str(error.value), error.remedy
    return None
