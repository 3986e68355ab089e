"""A model's tensors on the two sides of a conversion: of an HF folder, and of a sharded megatron checkpoint.

The embedding and the output layer, by far the largest, are read and written in pieces of some rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from owpo_megatron.conversion.writer import digest
from owpo_megatron.families import (
    HFModel,
    HFReader,
    float32_tensors,
    hf_parts,
    is_float32,
    megatron_names,
    megatron_shape,
    padded_vocab_size,
    place_of,
    to_hf,
    to_megatron,
)
from owpo_megatron.mcore.sharded_files import PartFile, StoredState

_VOCAB_ROWS = 16384  # of a piece
Rows = Iterable[tuple[int, torch.Tensor]]  # (first row, rows)


class Side(Protocol):
    """HF tensors by their names, wherever they come from."""

    def tensor(self, hf_name: str) -> torch.Tensor: ...

    def rows(self, hf_name: str) -> Rows:
        """The embedding or the output layer in pieces."""

    def hashes(self, name: str) -> dict[str, str]:
        """sha256 of the HF tensors of a megatron parameter."""


class HFSide:
    """The tensors of an HF folder as they are, in `dtype`: no rule has touched them."""

    def __init__(self, model: HFModel, reader: HFReader, dtype: torch.dtype):
        self._model, self._reader, self._dtype = model, reader, dtype

    def tensor(self, hf_name: str) -> torch.Tensor:
        return self._reader.tensor(hf_name).to(dtype_of(self._model, hf_name, self._dtype))

    def rows(self, hf_name: str) -> Rows:
        for first, stop in row_pieces(self._model):
            yield first, self._reader.slice(hf_name, 0, first, stop).to(self._dtype)

    def hashes(self, name: str) -> dict[str, str]:
        if place_of(self._model, name).is_vocabulary:
            (hf_name,) = hf_parts(self._model, name)
            return {hf_name: digest(rows for _, rows in self.rows(hf_name))}
        return {hf_name: digest([self.tensor(hf_name)]) for hf_name in hf_parts(self._model, name)}

    def store(self, name: str, part: PartFile) -> None:
        """Write the megatron parameter `name` into a sharded checkpoint."""
        place = place_of(self._model, name)
        key = f"model.{place.name}"
        if not place.is_vocabulary:
            dtype = torch.float32 if is_float32(self._model, name) else self._dtype
            tensor = to_megatron(self._model, name, self._reader).to(dtype)
            part.add(key, place.index, place.leading, tensor, blocks=place.blocks)
            return
        (hf_name,) = hf_parts(self._model, name)
        padded = padded_vocab_size(self._model.vocab_size, 1)
        for first, rows in self.rows(hf_name):
            if first + len(rows) == self._model.vocab_size:
                rows = torch.cat([rows, rows.new_zeros(padded - self._model.vocab_size, *rows.shape[1:])])
            part.add(key, (), (), rows, first_row=first, all_rows=padded)


class StoredSide:
    """The HF tensors that a sharded checkpoint gives back by the family's rules."""

    def __init__(self, model: HFModel, state: StoredState):
        self._model, self._state = model, state
        self._made_of = {hf_name: name for name in megatron_names(model) for hf_name in hf_parts(model, name)}
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})  # queries, keys and values are asked for in turn

    def tensor(self, hf_name: str) -> torch.Tensor:
        name = self._made_of[hf_name]
        if self._last[0] != name:
            self._last = (name, dict(self._whole(name)))
        return self._last[1][hf_name]

    def rows(self, hf_name: str) -> Rows:
        for first, stop in row_pieces(self._model):
            yield first, self._state.tensor(key_of(self._model, self._made_of[hf_name]), (), (first, stop))

    def pieces(self, name: str) -> Iterator[tuple[str, Rows]]:
        """(HF name, its rows) of the HF tensors of a megatron parameter."""
        if place_of(self._model, name).is_vocabulary:
            (hf_name,) = hf_parts(self._model, name)
            yield hf_name, self.rows(hf_name)
            return
        for hf_name, tensor in self._whole(name):
            yield hf_name, [(0, tensor)]

    def hashes(self, name: str) -> dict[str, str]:
        return {hf_name: digest(rows for _, rows in pieces) for hf_name, pieces in self.pieces(name)}

    def _whole(self, name: str) -> list[tuple[str, torch.Tensor]]:
        place = place_of(self._model, name)
        return to_hf(self._model, name, [self._state.tensor(f"model.{place.name}", place.index)])


def row_pieces(model: HFModel) -> Iterator[tuple[int, int]]:
    """(first, last + 1) rows of the pieces of the vocabulary."""
    for first in range(0, model.vocab_size, _VOCAB_ROWS):
        yield first, min(first + _VOCAB_ROWS, model.vocab_size)


def dtype_of(model: HFModel, hf_name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of an HF tensor of a model in `dtype`."""
    return torch.float32 if hf_name in float32_tensors(model) else dtype


def key_of(model: HFModel, name: str) -> str:
    """The megatron parameter's key in a sharded checkpoint."""
    return f"model.{place_of(model, name).name}"


def stored_shapes(model: HFModel) -> dict[str, tuple[int, ...]]:
    """Every tensor of a sharded checkpoint of this model, by its key."""
    shapes = {}
    for name in megatron_names(model):
        place, (rows, *columns) = place_of(model, name), megatron_shape(model, name)
        rows = padded_vocab_size(model.vocab_size, 1) if place.is_vocabulary else rows
        shapes[f"model.{place.name}"] = (*place.leading, rows, *columns)
    return shapes
