"""owpo bench convert: convert, verify and export a random checkpoint of a real shape, next to a plain copy."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from owpo_megatron.bench.random_model import random_weights, write_config
from owpo_megatron.conversion import HFWriter
from owpo_megatron.families import HFReader

QWEN25_15B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def measure(
    folder: Path,
    layers: int,
    jobs: int | None,
    log: Callable[[str], None],
    run: Callable[..., tuple[float, float]] | None = None,
    **shape: Any,
) -> Iterator[dict[str, Any]]:
    """Yield rows {what, megabytes, seconds, mb_per_s, times_copy, peak_rss_mb}; `folder` is empty again afterwards.

    Each step runs in its own process: `peak_rss_mb` is its largest resident size, including mapped files and libraries.
    Seconds exclude the start of the process and include flushing what is written to the disk.

    Args:
        folder: working folder, with free space for three times the checkpoint.
        layers: number of layers of Qwen2.5-1.5B's shape, with random bfloat16 weights; `shape` overrides other fields.
        run: executes and measures a step; default: `in_a_process`.
    """
    run = run or in_a_process
    folder.mkdir(parents=True, exist_ok=True)
    hf, copy, megatron, back = (folder / name for name in ("hf", "copy", "megatron", "back"))
    try:
        log("writing a random checkpoint")
        make_checkpoint(hf, QWEN25_15B | shape | {"num_hidden_layers": layers})
        megabytes = sum(file.stat().st_size for file in HFReader(hf).files()) / 1e6
        steps: list[tuple[str, Callable[..., None], tuple[Any, ...], Path | None]] = [
            ("copy", _copy, (hf, copy), copy),
            ("import", _import, (hf, megatron, jobs), None),
            ("prove", _prove, (megatron, jobs), None),
            ("export", _export, (megatron, back, jobs), None),
        ]
        copied = None
        for what, work, arguments, remove in steps:
            log(what)
            seconds, peak = run(work, arguments)
            copied = copied or seconds
            if remove:
                shutil.rmtree(remove)
            yield {
                "what": what,
                "megabytes": round(megabytes, 1),
                "seconds": round(seconds, 3),
                "mb_per_s": round(megabytes / seconds, 1),
                "times_copy": round(seconds / copied, 3),
                "peak_rss_mb": round(peak / 1e6),
            }
    finally:
        for made in (hf, copy, megatron, back):
            shutil.rmtree(made, ignore_errors=True)


def make_checkpoint(folder: Path, fields: dict[str, Any]) -> None:
    """Write a random bfloat16 model with this config.json as an HF folder, one tensor in memory at a time."""
    with TemporaryDirectory(dir=folder.parent) as name:
        template = Path(name)
        model = write_config(template, fields)
        with HFWriter(folder, template, model, max_shard_bytes=2**30) as writer:
            for tensor_name, tensor in random_weights(model, torch.bfloat16):
                writer.add(tensor_name, tensor)


def in_a_process(work: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Run a step in a new process; return its seconds and largest resident bytes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timed, work, arguments).result()


def timed(work: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """Run a step in this process; return its seconds and the process's largest resident bytes."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from owpo_megatron.conversion import export  # noqa: F401  (imports belong to the start of the process)

    os.sync()  # exclude earlier writes from this step's time
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _copy(hf: Path, out: Path) -> None:
    out.mkdir()
    for file in HFReader(hf).files():
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as copied:
            os.fsync(copied.fileno())


def _import(hf: Path, out: Path, jobs: int | None) -> None:
    from owpo_megatron.conversion.export import hf_to_megatron

    hf_to_megatron(hf, out, jobs=jobs, proof=False)


def _prove(megatron: Path, jobs: int | None) -> None:
    from owpo_megatron.conversion.export import verify

    torch.set_num_threads(jobs or len(os.sched_getaffinity(0)))
    verify(megatron, jobs=jobs)


def _export(megatron: Path, out: Path, jobs: int | None) -> None:
    from owpo_megatron.conversion.export import megatron_to_hf

    megatron_to_hf(megatron, out, jobs=jobs, proof=False)
