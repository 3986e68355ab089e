"""Whole models between HF folders and megatron folders, in one process on the CPU.

A megatron folder (what `model.path` takes besides an HF folder):
    state/   the weights, sharded (torch_dist): readable at any tensor, pipeline and data parallel size
    hf/      config.json, tokenizer, generation config and chat template of the HF folder it came from
The state/ of a run's checkpoint has the policy's weights in the same form, beside optimizer and reference.

Both directions keep every bit, and what they make appears complete or not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.config import HF_FILES, Config, ParallelConfig, hf_folder
from owpo_megatron.convert import (
    HFModel,
    HFReader,
    HFWriter,
    carry_files,
    check_weights,
    read_hf_config,
    to_hf,
    to_megatron,
)
from owpo_megatron.errors import UserError
from owpo_megatron.parallel import checkpoint
from owpo_megatron.parallel.loading import MEGATRON_STATE
from owpo_megatron.parallel.topology import close_topology, init_topology
from owpo_megatron.parallel.transformer import build_chunks, transformer_config
from owpo_megatron.parallel.weights import named_shards
from owpo_megatron.types import Progress

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MANIFEST = "manifest.json"  # a run's checkpoint has it from the moment it is whole


def hf_to_megatron(hf: Path, out: Path, dtype: str | None = None, progress: Progress | None = None) -> None:
    """Make the megatron folder `out` from an HF folder.

    Args:
        dtype: float32 or bfloat16; None: that of the HF weights.
        progress: called after every parameter.

    Raises:
        UserError: `hf` is no HF folder of a known family, its weights do not fit its config, or `out` exists.
    """
    model, reader = read_hf_config(hf), HFReader(hf)
    check_weights(model, reader)
    _refuse_existing(out)
    with _one_rank(model, _dtype_of(reader, dtype)) as chunks:
        params = list(named_shards(chunks))
        with torch.no_grad():
            for done, (name, param) in enumerate(params, 1):
                param.copy_(to_megatron(model, name, reader))
                _tell(progress, done, len(params))
        partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
        try:
            for folder in (MEGATRON_STATE, HF_FILES):
                (partial / folder).mkdir(parents=True)
            carry_files(hf, partial / HF_FILES)
            checkpoint.save_weights(partial / MEGATRON_STATE, chunks)
            partial.rename(out)
        finally:
            if partial.exists():
                shutil.rmtree(partial)


def megatron_to_hf(megatron: Path, out: Path, template: Path | None = None, progress: Progress | None = None) -> None:
    """Make the HF folder `out` from a megatron folder or a run's checkpoint folder (its policy).

    Args:
        template: HF folder with config and tokenizer. None: the megatron folder's own hf/, or, for a checkpoint, what
            the run's config.yaml names as model.path.
        progress: called after every parameter.

    Raises:
        UserError: `megatron` is neither of the two or not whole, no template is found or it is of another model, or
            `out` exists.
    """
    state = megatron / MEGATRON_STATE
    _refuse_half(megatron)
    template = template or _template_of(megatron)
    model = read_hf_config(template)
    dtype = checkpoint.stored_dtype(state)
    with HFWriter(out, template, model) as writer, _one_rank(model, dtype) as chunks:
        checkpoint.load_weights(state, chunks)
        params = list(named_shards(chunks))
        for done, (name, param) in enumerate(params, 1):
            for hf_name, tensor in to_hf(model, name, [param]):
                writer.add(hf_name, tensor)
            _tell(progress, done, len(params))


@contextmanager
def _one_rank(model: HFModel, dtype: torch.dtype) -> Iterator[list[Any]]:
    """The whole model as the chunk of a world of one, its weights not yet set."""
    parallel = ParallelConfig()
    init_topology(parallel, seed=0)
    try:
        # every weight comes from a file
        config = transformer_config(model, parallel, dtype, {"perform_initialization": False})
        yield build_chunks(model, config, temperature=1.0)
    finally:
        close_topology()


def _dtype_of(reader: HFReader, wanted: str | None) -> torch.dtype:
    name = reader.names()[0]
    stored = str(reader.slice(name, 0, 0, 1).dtype).removeprefix("torch.")
    if (wanted or stored) not in _DTYPES:
        raise UserError("dtype", wanted or f"{stored} (of the weights)", f"give --dtype, one of {', '.join(_DTYPES)}")
    return _DTYPES[wanted or stored]


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError("out", out, "exists already; choose another folder or remove it")


def _refuse_half(megatron: Path) -> None:
    if not (megatron / MEGATRON_STATE).is_dir():
        raise UserError(
            "megatron", megatron, f"has no {MEGATRON_STATE}/; give a converted folder or a run's step_N folder"
        )
    if not (megatron / HF_FILES).is_dir() and not (megatron / _MANIFEST).is_file():
        raise UserError("megatron", megatron, f"has neither {HF_FILES}/ nor {_MANIFEST}: it was never finished")


def _template_of(megatron: Path) -> Path:
    if (megatron / HF_FILES).is_dir():
        return megatron / HF_FILES
    config = megatron.resolve().parent.parent / "config.yaml"
    if not config.is_file():
        raise UserError("megatron", megatron, f"its run's {config} is gone; give the HF folder with --hf-template")
    return hf_folder(Config.load(config).model.path, f"{config} model.path")


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
