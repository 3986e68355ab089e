"""Whole models between HF folders and megatron folders, on the CPU, tensor by tensor, with a proof at the end.

A megatron folder (what `model.path` takes besides an HF folder):
    state/            the weights, sharded (torch_dist): readable at any tensor, pipeline, expert and data parallel size
    hf/               config.json, tokenizer, generation config and chat template of the HF folder it came from
    conversion.json   the hash of every tensor, and the proof
The state/ of a run's checkpoint has the policy's weights in the same form, beside optimizer and reference.

Both directions keep every bit and hold a few tensors at a time. What they make appears complete or not at all; what an
interrupted attempt leaves in a hidden folder, the next one goes on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from owpo_megatron import __version__
from owpo_megatron.config import HF_FILES
from owpo_megatron.conversion import carry_files
from owpo_megatron.conversion.megatron_folder import open_megatron, stored_dtype
from owpo_megatron.conversion.parts import Stage, each_part, threads
from owpo_megatron.conversion.proof import prove
from owpo_megatron.conversion.tensors import HFSide, Rows, Side, StoredSide
from owpo_megatron.conversion.unfinished import Unfinished
from owpo_megatron.conversion.writer import ShardFiles, digest, state_dtype
from owpo_megatron.errors import ProofError, UserError
from owpo_megatron.families import (
    HFModel,
    HFReader,
    check_weights,
    float32_tensors,
    hf_shapes,
    megatron_names,
    read_hf_config,
    stack_of,
    stacked_shapes,
)
from owpo_megatron.mcore.sharded_files import PartFile, StoredState, finish_state, part_is_whole
from owpo_megatron.run.layout import CONVERSION, MANIFEST, STATE
from owpo_megatron.run.manifest import Conversion

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_CONVERTED = ("float32", "bfloat16")
_SHARD_BYTES = 5 * 2**30


def hf_to_megatron(
    hf: Path,
    out: Path,
    dtype: str | None = None,
    stage: Stage | None = None,
    jobs: int | None = None,
    proof: bool = True,
) -> Conversion:
    """Make the megatron folder `out` from an HF folder.

    Args:
        dtype: float32 or bfloat16; None: that of the HF weights.
        stage: receives the progress of "convert" and "prove".
        jobs: threads; None: one per core.
        proof: False leaves the proof to `verify`; training refuses the folder until then.

    Raises:
        UserError: `hf` is no HF folder of a known family, its weights do not fit its config, or `out` exists.
        ProofError: the result is not the same model. `out` is not there then.
    """
    model, reader = read_hf_config(hf), HFReader(hf)
    check_weights(model, reader)
    chosen = _dtype_of(model, reader, dtype)
    sources = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in reader.files()]
    plan = {"from": str(hf.resolve()), "files": sources, "dtype": chosen, "version": __version__}
    target = getattr(torch, chosen)
    with Unfinished(out, plan) as work:
        state = work.path / STATE
        for folder in (state, work.path / HF_FILES):
            folder.mkdir(exist_ok=True)

        def write(number: int, names: list[str]) -> dict[str, Any]:
            side = HFSide(model, HFReader(hf), target)  # what its reader mapped into memory goes with it
            hashes: dict[str, str] = {}
            with PartFile(state, number) as part:
                for name in names:
                    side.store(name, part)
                    hashes |= side.hashes(name)
            return {"entries": part.entries, "hashes": hashes}

        def is_whole(record: dict[str, Any]) -> bool:
            return part_is_whole(state, record["entries"])

        records = each_part(model, target, work, write, is_whole, stage, jobs)
        finish_state(state, [entry for record in records for entry in record["entries"]])
        carry_files(hf, work.path / HF_FILES)
        state_dtype(work.path / HF_FILES / "config.json", target)
        conversion = Conversion(model.family_name, chosen, _merged(record["hashes"] for record in records), None)
        if proof:
            stored = StoredState(state)
            written, source = StoredSide(model, stored), HFSide(model, reader, target)
            conversion = _proved(conversion, model, hf, stored, source, written, stage, jobs)
        return _finished(work, conversion)


def megatron_to_hf(
    megatron: Path,
    out: Path,
    template: Path | None = None,
    stage: Stage | None = None,
    jobs: int | None = None,
    proof: bool = True,
) -> Conversion:
    """Make the HF folder `out` from a megatron folder or a run's checkpoint folder (its policy).

    Args:
        template: HF folder with config and tokenizer. None: the megatron folder's own hf/, or, for a checkpoint, what
            the run's config.yaml names as model.path.
        stage, jobs, proof: as `hf_to_megatron`.

    Raises:
        UserError: `megatron` is neither of the two or not whole, no template is found or it is of another model, or
            `out` exists.
        ProofError: the result is not the same model. `out` is not there then.
    """
    template, model, stored = open_megatron(megatron, template)
    dtype = stored_dtype(model, stored)
    plan = {
        "from": str(megatron.resolve()),
        "at": stored.written_at(),
        "template": str(template.resolve()),
        "version": __version__,
    }
    side = StoredSide(model, stored)
    with Unfinished(out, plan) as work:
        shapes = stacked_shapes(hf_shapes(model))
        files = ShardFiles(work.path, shapes, dtype, _SHARD_BYTES, float32_tensors(model))

        def write(_: int, names: list[str]) -> dict[str, str]:
            return {
                hf_name: digest(_writing(files, hf_name, rows)) for name in names for hf_name, rows in side.pieces(name)
            }

        records = each_part(model, dtype, work, write, lambda record: True, stage, jobs)
        files.write_index()
        carry_files(template, work.path)
        state_dtype(work.path / "config.json", dtype)
        conversion = Conversion(model.family_name, _name_of(dtype), _merged(records), None)
        if proof:
            written = HFSide(model, HFReader(work.path), dtype)
            conversion = _proved(conversion, model, work.path, stored, written, written, stage, jobs)
        return _finished(work, conversion)


def verify(
    megatron: Path,
    hf: Path | None = None,
    template: Path | None = None,
    stage: Stage | None = None,
    jobs: int | None = None,
) -> Conversion:
    """Verify a megatron folder or a run's checkpoint again, against an HF folder or its own hashes.

    The result is written to the folder's conversion.json; a run's checkpoint is not changed.

    Args:
        hf: the other side; None: the tensors that `megatron` itself gives back, which have to have the hashes that
            its conversion.json keeps of the HF folder that it came from.

    Raises:
        UserError: a side is not whole, or not a model of that shape; without `hf`, there are no hashes.
        ProofError: the two are not the same model.
    """
    own, model, stored = open_megatron(megatron, template)
    dtype = stored_dtype(model, stored)
    known, written = Conversion.read(megatron), StoredSide(model, stored)
    if hf is not None:
        reader = HFReader(hf)
        check_weights(model, reader)
        source: Side = HFSide(model, reader, dtype)
        with ThreadPoolExecutor(threads(jobs)) as pool:
            hashes = _merged(pool.map(source.hashes, megatron_names(model)))
    elif known is not None:
        source, hashes = written, known.tensors
    else:
        raise UserError("--hf", "(missing)", f"{megatron} has no {CONVERSION} with hashes; give the HF folder, too")
    conversion = Conversion(model.family_name, _name_of(dtype), hashes, None)
    conversion = _proved(conversion, model, hf or own, stored, source, written, stage, jobs)
    if not (megatron / MANIFEST).is_file():
        conversion.write(megatron)
    assert conversion.proof is not None
    if not conversion.proof.ok:
        raise ProofError(f"{megatron}: {conversion.proof.complaint}")
    return conversion


def _proved(
    conversion: Conversion,
    model: HFModel,
    config_folder: Path,
    stored: StoredState,
    source: Side,
    written: Side,
    stage: Stage | None,
    jobs: int | None,
) -> Conversion:
    """Add the proof that `written` has the conversion's hashes and that `stored` computes what `source` computes."""
    progress = stage("prove") if stage else None
    return replace(
        conversion,
        proof=prove(model, config_folder, stored, source, conversion.tensors, written, threads(jobs), progress),
    )


def _finished(work: Unfinished, conversion: Conversion) -> Conversion:
    """The last step: the folder gets its name, unless its proof failed."""
    if conversion.proof is not None and not conversion.proof.ok:
        work.discard()
        raise ProofError(f"{conversion.proof.complaint}; nothing was made")
    conversion.write(work.path)
    work.finish()
    return conversion


def _merged(hashes: Iterable[dict[str, str]]) -> dict[str, str]:
    return {name: sha for some in hashes for name, sha in some.items()}


def _writing(files: ShardFiles, hf_name: str, pieces: Rows) -> Iterator[torch.Tensor]:
    """The pieces, each written on its way; an expert's tensor is an entry of its stack."""
    stack = stack_of(hf_name)
    for first, rows in pieces:
        if stack:
            files.write(stack[0], rows[None], stack[1])
        else:
            files.write(hf_name, rows, first)
        yield rows


def _dtype_of(model: HFModel, reader: HFReader, wanted: str | None) -> str:
    """The dtype to convert to: the wanted one, else the one that all weights have."""
    names = hf_shapes(model).keys() - float32_tensors(model)
    kinds = sorted({_DTYPES.get(kind := reader.dtype(name), kind) for name in names})
    if wanted is None and (len(kinds) > 1 or kinds[0] not in _CONVERTED):
        raise UserError(
            "dtype", f"{', '.join(kinds)} (of the weights)", f"give --dtype, one of {', '.join(_CONVERTED)}"
        )
    return wanted or kinds[0]


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
