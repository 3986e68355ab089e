"""Weights between an HF checkpoint and megatron's shards, one parameter at a time, bit for bit in both directions.

A megatron name here carries the indices of layer and expert in the whole model (not in its pipeline stage or on its
expert-parallel rank) and no wrapper prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from owpo_megatron.errors import UserError
from owpo_megatron.families.fits import padded_vocab_size
from owpo_megatron.families.fusing import fused, unfused
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.reader import HFReader
from owpo_megatron.families.rules import EMBEDDING, LM_HEAD, OUTPUT_LAYER, Part, Rule

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)|(?<=linear_fc[12]\.weight)\d+$|(?<=linear_fc[12]\.bias)\d+$")
_SHOWN = 8  # names of each kind in an error


@dataclass(frozen=True)
class Place:
    """Place of a megatron parameter in a sharded checkpoint: an entry of one tensor for all layers and experts.

    Where layers differ (some with experts, some without) each has a tensor of its own, as megatron-core saves them.

    Example: expert 5 of layer 2 is entry (2, 5) of "decoder.layers.mlp.experts.experts.linear_fc1.weight".
    """

    name: str
    index: tuple[int, ...]  # layer, expert; () outside the layers
    leading: tuple[int, ...]  # how many layers and experts there are
    blocks: int = 1  # equal blocks of rows that ranks read apart: 2 for a gate and an up projection
    is_vocabulary: bool = False  # its rows may be followed by padding, and it may be read and written in pieces


def to_megatron(model: HFModel, name: str, reader: HFReader, *, tp_rank: int = 0, tp_size: int = 1) -> torch.Tensor:
    """This TP rank's shard of the megatron parameter `name`; only its own slices are read from disk.

    With tied embeddings `output_layer.weight` (the copy on the last pipeline stage) reads the embedding.

    Raises:
        UserError: the family has no such parameter.

    Example:
        to_megatron(model, "decoder.layers.7.mlp.linear_fc1.weight", reader, tp_rank=1, tp_size=2)
    """
    rule, index = _find(model, EMBEDDING if model.tied and name == OUTPUT_LAYER else name)
    grouped = rule.fuse in ("groups", "gated_groups") and rule.tp_dim is not None
    assert not grouped or model.size(rule.groups) % tp_size == 0, "groups do not divide over TP ranks"
    pieces = []
    for part in rule.hf:
        shape, first = _shape(model, part), _first_row(model, part)
        hf_name = part.name.format(**index)
        if rule.tp_dim is None:
            piece = reader.slice(hf_name, 0, first, first + shape[0])
        elif part.shape[0] == "vocab":
            piece = _vocab_rows(reader, hf_name, model.vocab_size, tp_rank, tp_size)
        else:
            dim = part.dim(rule.tp_dim)
            assert shape[dim] % tp_size == 0, f"{hf_name} {shape} does not divide over {tp_size} ranks"
            length = shape[dim] // tp_size
            start = first + tp_rank * length
            piece = reader.slice(hf_name, dim, start, start + length)
        pieces.append(piece.t().contiguous() if part.transposed else piece)
    return fused(model, rule, pieces)


def to_hf(model: HFModel, name: str, shards: Sequence[torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """(HF name, full tensor) of every HF tensor that the megatron parameter `name` is made of.

    Args:
        shards: the parameter of every TP rank, in rank order (of a replicated one, the first is taken).

    Returns:
        Contiguous or not, possibly views of the shards; padding rows of the vocabulary are dropped. Empty for the
        output layer of a model with tied embeddings: the embedding stands for both.

    Raises:
        UserError: the family has no such parameter.
    """
    if model.tied and name == OUTPUT_LAYER:
        return []
    rule, index = _find(model, name)
    split_shards = [unfused(model, rule, shard) for shard in shards]
    tensors: dict[str, dict[int, torch.Tensor]] = {}  # HF name -> its parts by their first row
    for part, pieces in zip(rule.hf, zip(*split_shards, strict=True), strict=True):
        tensor = pieces[0] if rule.tp_dim is None or len(pieces) == 1 else torch.cat(pieces, dim=rule.tp_dim)
        tensor = tensor.t() if part.transposed else tensor
        if part.shape[0] == "vocab":
            tensor = tensor[: model.vocab_size]
        assert tuple(tensor.shape) == _shape(model, part), f"{name}: {tuple(tensor.shape)} for {part.name}"
        tensors.setdefault(part.name.format(**index), {})[_first_row(model, part)] = tensor
    return [
        (hf_name, parts[0] if len(parts) == 1 else torch.cat([parts[row] for row in sorted(parts)]))
        for hf_name, parts in tensors.items()
    ]


def megatron_names(model: HFModel) -> Iterator[str]:
    """Every parameter of the whole model by its (first) megatron name: the outer ones, then layer by layer."""
    rules = [rule for rule in model.rules if not (model.tied and rule.megatron[0] == OUTPUT_LAYER)]
    yield from (rule.megatron[0] for rule in rules if not rule.per_layer)
    for layer in range(model.num_layers):
        for rule in rules:
            if rule.per_layer and in_layer(model, rule, layer):
                for expert in range(model.num_experts) if rule.per_expert else [0]:
                    yield rule.megatron[0].format(layer=layer, expert=expert)


def in_layer(model: HFModel, rule: Rule, layer: int) -> bool:
    """True where this layer has the parameter of a rule."""
    return rule.layers not in _absent(model.has_experts(layer), model.is_linear(layer))


def _absent(experts: bool, linear: bool) -> tuple[str, str]:
    """The kinds that a layer is none of."""
    return "dense" if experts else "experts", "full" if linear else "linear"


def hf_parts(model: HFModel, name: str) -> dict[str, tuple[int, ...]]:
    """The HF tensors that the megatron parameter `name` is made of, with their shapes. Raises UserError as `to_hf`."""
    rule, index = _find(model, name)
    shapes: dict[str, tuple[int, ...]] = {}
    for part in rule.hf:
        hf_name, shape = part.name.format(**index), _shape(model, part)
        rows = _first_row(model, part) + shape[0]
        shapes[hf_name] = (max(rows, shapes[hf_name][0]) if hf_name in shapes else rows, *shape[1:])
    return shapes


def megatron_shape(model: HFModel, name: str) -> tuple[int, ...]:
    """The whole shape of the megatron parameter `name`, without padding. Raises UserError as `to_hf`."""
    rule, _ = _find(model, name)
    shapes = [_shape(model, part)[:: -1 if part.transposed else 1] for part in rule.hf]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def is_float32(model: HFModel, name: str) -> bool:
    """True of a megatron parameter that is float32 whatever the model's dtype. Raises UserError as `to_hf`."""
    return _find(model, name)[0].float32


@lru_cache
def float32_tensors(model: HFModel) -> frozenset[str]:
    """HF tensors that are float32 whatever the model's dtype: constants of a router."""
    names = (name for name in megatron_names(model) if is_float32(model, name))
    return frozenset(hf_name for name in names for hf_name in hf_parts(model, name))


def place_of(model: HFModel, name: str) -> Place:
    """Return the place of the megatron parameter `name` in a sharded checkpoint. Raises UserError as `to_hf`."""
    rule, index = _find(model, name)
    stored_name, sizes = rule.stored_name, {}
    if rule.per_layer and model.layers_differ:
        stored_name = stored_name.replace("decoder.layers.", f"decoder.layers.{index['layer']}.")
    elif rule.per_layer:
        sizes["layer"] = model.num_layers
    if rule.per_expert:
        sizes["expert"] = model.num_experts
    return Place(
        stored_name,
        tuple(index[axis] for axis in sizes),
        tuple(sizes.values()),
        blocks=2 if rule.fuse in ("gate_up", "pairs") else 1,
        is_vocabulary=rule.hf[0].shape[0] == "vocab",
    )


def hf_shapes(model: HFModel) -> dict[str, tuple[int, ...]]:
    """Every tensor of this model with its shape, experts one by one (see `stacks`)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in megatron_names(model):
        shapes |= hf_parts(model, name)
    return shapes


def forward_flops(model: HFModel) -> tuple[float, float]:
    """(FLOPs of a token's forward pass in matrix products, those of attention per token of its sequence).

    Only chosen experts count; the embedding is a look-up, the head a product. Causal attention sees half of the
    sequence on average: 2 * 2 * query width / 2 per token and layer, for scores and values.
    """
    active = 0.0
    for name, shape in hf_shapes(model).items():
        if len(shape) < 2 or ("embed_tokens" in name and not model.tied):
            continue
        chosen = model.experts.router.chosen / model.num_experts if model.experts and ".experts." in name else 1.0
        active += math.prod(shape) * chosen
    return 2 * active, 2.0 * model.attention_layers * model.size("q")


def check_weights(model: HFModel, reader: HFReader) -> None:
    """Compare the checkpoint's tensors with what the model needs, before anything is loaded.

    Raises:
        UserError: with the missing, unexpected and wrongly shaped tensors.
    """
    expected = hf_shapes(model)
    found = set(reader.names())
    # buffers of old checkpoints, the copy some tied checkpoints carry, and what the family leaves out
    patterns = [re.compile(pattern) for pattern in model.family.ignored_in(model)]
    ignored = {
        name
        for name in found
        if name.endswith("rotary_emb.inv_freq")
        or (model.tied and name == LM_HEAD)
        or any(pattern.match(name) for pattern in patterns)
    }
    wrong = [
        f"{name} {reader.shape(name)} instead of {shape}"
        for name, shape in expected.items()
        if name in found and reader.shape(name) != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unexpected": sorted(found - set(expected) - ignored),
        "wrong shape": wrong,
    }
    found_wrong = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found_wrong:
        raise UserError(
            "model.path", reader.folder, f"its weights do not fit its config.json; {'; '.join(found_wrong)}"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shape(model: HFModel, part: Part) -> tuple[int, ...]:
    return tuple(model.size(size) for size in part.shape)


def _first_row(model: HFModel, part: Part) -> int:
    return sum(model.size(size) for size in part.behind)


def _find(model: HFModel, name: str) -> tuple[Rule, dict[str, int]]:
    """(the rule of a megatron name, its "layer" and "expert", 0 where it has none)."""
    template, index = name, {"layer": 0, "expert": 0}
    known = True
    for axis, pattern, size in (("layer", _LAYER, model.num_layers), ("expert", _EXPERT, model.num_experts)):
        if match := pattern.search(template):
            index[axis] = int(match[0])
            known = known and index[axis] < size
            template = pattern.sub(f"{{{axis}}}", template, count=1)
    layer = index["layer"]
    rule = _rules_by_name(model, model.has_experts(layer), model.is_linear(layer)).get(template)
    if rule is None or not known:
        experts = f" and {model.num_experts} experts" if model.experts else ""
        raise UserError(
            "megatron parameter",
            name,
            f"{model.family_name} with {model.num_layers} layers{experts} has none of that name",
        )
    return rule, index


@lru_cache
def _rules_by_name(model: HFModel, experts: bool, linear: bool) -> dict[str, Rule]:
    """megatron name -> rule, for layers with experts or without, with a delta net or attention."""
    absent = _absent(experts, linear)
    return {name: rule for rule in model.rules if rule.layers not in absent for name in rule.megatron}


def _vocab_rows(reader: HFReader, hf_name: str, vocab_size: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Rows of one rank, zeros below the true vocabulary."""
    length = padded_vocab_size(vocab_size, tp_size) // tp_size
    start, stop = (min(edge, vocab_size) for edge in (tp_rank * length, (tp_rank + 1) * length))
    rows = reader.slice(hf_name, 0, start, stop)
    return torch.cat([rows, rows.new_zeros(length - len(rows), rows.shape[1])])
