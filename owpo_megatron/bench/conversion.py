"""owpo bench convert: a random checkpoint of a real shape, converted, proved and exported, beside a plain copy."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.conversion import HFWriter
from owpo_megatron.families import HFReader, hf_shapes, read_hf_config

QWEN25_15B = dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)


def measure(
    folder: Path,
    layers: int,
    jobs: int | None,
    say: Callable[[str], None],
    run: Callable[..., tuple[float, float]] | None = None,
    **shape: Any,
) -> Iterator[dict[str, Any]]:
    """Rows {what, seconds, mb_per_s, times_copy, peak_rss_mb} of one checkpoint; `folder` is empty again afterwards.

    Each step runs in a process of its own: `peak_rss_mb` is its largest resident size, mapped files and libraries
    included. Seconds are without the start of the process; what is written is on the disk when they end.

    Args:
        folder: where there is room for three times the checkpoint.
        layers: of Qwen2.5-1.5B's shape, random in bfloat16; `shape` replaces fields of its config.
        run: how a step is run and measured; None: `in_a_process`.
    """
    run = run or in_a_process
    folder.mkdir(parents=True, exist_ok=True)
    hf, copy, megatron, back = (folder / name for name in ("hf", "copy", "megatron", "back"))
    try:
        say("making a random checkpoint")
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
            say(what)
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
    """A random bfloat16 Qwen2 as an HF folder, one tensor in memory at a time."""
    from transformers import Qwen2Config

    template = folder.with_name(f".{folder.name}.template")
    try:
        Qwen2Config(architectures=["Qwen2ForCausalLM"], **fields).save_pretrained(template)
        model = read_hf_config(template)
        generator = torch.Generator().manual_seed(0)
        with HFWriter(folder, template, model, max_shard_bytes=2**30) as writer:
            for name, shape in hf_shapes(model).items():
                tensor = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03, generator=generator)
                writer.add(name, tensor + 1 if "norm" in name else tensor)
    finally:
        shutil.rmtree(template, ignore_errors=True)


def in_a_process(work: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """(seconds, largest resident bytes) of a step that has a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timed, work, arguments).result()


def timed(work: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[float, float]:
    """(seconds, largest resident bytes) of this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from owpo_megatron.conversion import export  # noqa: F401  (its imports are the start of the process)

    os.sync()  # what was written before is not this step's
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
