"""The proof of a conversion: the same tensors bit for bit, and the same logits, one layer in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from owpo_megatron.conversion.hf_layers import HFLayers
from owpo_megatron.conversion.tensors import Rows, Side, key_of, row_pieces
from owpo_megatron.families import HFModel, hf_shapes, megatron_names
from owpo_megatron.families.rules import EMBEDDING, HF_EMBEDDING, HF_FINAL_NORM, LM_HEAD, OUTPUT_LAYER
from owpo_megatron.mcore.layerwise import StoredLayers, one_rank
from owpo_megatron.mcore.sharded_files import StoredState
from owpo_megatron.run.manifest import Proof

TOLERANCE = 1e-5  # of a logit, relative to the largest one where that exceeds 1
_TOKENS = 32
_BEYOND, _MOST_TOKENS = 8, 1024  # so many more than an attention window has, unless that would be too long
_PROMPTS = 3  # tried for a model with experts: two that tie within rounding may be chosen differently
_LAYER_TOLERANCE = 1e-3  # beyond it, a layer is named as the first that differs
_SHOWN = 4  # tensors in a complaint
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def prove(
    model: HFModel,
    config_folder: Path,
    state: StoredState,
    source: Side,
    hashes: Mapping[str, str],
    written: Side,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Proof:
    """Compare an HF checkpoint with sharded megatron weights.

    transformers computes one side, megatron-core the other, from the embedding to the logits of a fixed prompt. Memory:
    one layer in float32 a side.

    Args:
        config_folder: HF folder with the config.json.
        state: the megatron side.
        source: the HF side that transformers computes with.
        hashes: sha256 of every HF tensor as it should be.
        written: what is compared with them.
        jobs: threads that hash.
    """
    names = list(megatron_names(model))
    wrong = []
    steps = len(names) + model.num_layers
    with ThreadPoolExecutor(jobs) as pool:
        for done, found in enumerate(pool.map(written.hashes, names), 1):
            wrong += [hf_name for hf_name, sha in found.items() if hashes.get(hf_name) != sha]
            _tell(progress, done, steps)
    wrong += sorted(set(hashes) - set(hf_shapes(model)))
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        complaint = f"other bits than the source has: {', '.join(wrong[:_SHOWN])}{more}"
        return Proof(False, len(hashes), 0, 0.0, 0.0, TOLERANCE, complaint)
    proof = None
    for attempt in range(_PROMPTS if model.experts else 1):
        proof = _compare_logits(
            model, config_folder, state, source, attempt,
            lambda layer: _tell(progress, len(names) + layer, steps),
        )  # fmt: skip
        if proof.ok:
            break
    assert proof is not None
    return proof


def _compare_logits(
    model: HFModel,
    config_folder: Path,
    state: StoredState,
    source: Side,
    seed: int,
    layer_done: Callable[[int], None],
) -> Proof:
    window = model.attention.window or 0
    tokens = window + _BEYOND if _TOKENS < window + _BEYOND <= _MOST_TOKENS else _TOKENS
    prompt_T = torch.randint(0, model.vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    ours = _embed(prompt_T, _stored_rows(state, model, EMBEDDING)) * model.multipliers.embedding
    theirs = _embed(prompt_T, source.rows(HF_EMBEDDING)) * model.multipliers.embedding
    complaint = "" if torch.equal(ours, theirs) else "the embeddings differ"
    with one_rank():
        stored_layers, hf_layers = StoredLayers(state, model), HFLayers(config_folder, model)
        for layer, names in enumerate(_hf_names_by_layer(model)):
            tensors = {name: source.tensor(name) for name in names}
            last = layer == model.num_layers - 1
            theirs = hf_layers.layer(tensors, source.tensor(HF_FINAL_NORM) if last else None, theirs)
            del tensors
            ours = stored_layers.layer(layer, ours)
            apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1))
            if not apart < _LAYER_TOLERANCE and not complaint:
                complaint = f"layer {layer} is the first that computes something else"
            layer_done(layer + 1)
    gaps, largest = [], 0.0
    our_head, their_head = (EMBEDDING, HF_EMBEDDING) if model.tied else (OUTPUT_LAYER, LM_HEAD)
    pieces = zip(_stored_rows(state, model, our_head), source.rows(their_head), strict=True)
    for (_, our_rows), (_, their_rows) in pieces:
        our_logits, their_logits = F.linear(ours, our_rows.float()), F.linear(theirs, their_rows.float())
        gaps.append((our_logits - their_logits).abs().max())
        largest = max(largest, float(their_logits.abs().max()))
    difference = float(torch.stack(gaps).max())  # a NaN of any piece is the largest
    tolerance = TOLERANCE * max(1.0, largest)
    ok = difference <= tolerance
    if not ok and not complaint:
        complaint = "the logits differ"
    told = "" if ok else f"{complaint} (logits up to {difference:.3g} apart, {tolerance:.3g} allowed)"
    return Proof(ok, len(hf_shapes(model)), tokens, largest, difference, tolerance, told)


def _stored_rows(state: StoredState, model: HFModel, name: str) -> Rows:
    for first, stop in row_pieces(model):
        yield first, state.tensor(key_of(model, name), (), (first, stop))


def _embed(prompt_T: torch.Tensor, rows: Rows) -> torch.Tensor:
    hidden_TH: torch.Tensor | None = None
    for first, piece in rows:
        if hidden_TH is None:
            hidden_TH = torch.zeros(len(prompt_T), piece.shape[1])
        here_T = (prompt_T >= first) & (prompt_T < first + len(piece))
        hidden_TH[here_T] = piece[prompt_T[here_T] - first].float()
    assert hidden_TH is not None
    return hidden_TH


def _hf_names_by_layer(model: HFModel) -> list[list[str]]:
    """Group tensors by the layer in their HF names, independently of the rules to be proved."""
    by_layer: list[list[str]] = [[] for _ in range(model.num_layers)]
    for name in hf_shapes(model):
        if match := _LAYER.match(name):
            by_layer[int(match[1])].append(name)
    return by_layer


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
