"""Check that engines hold bit for bit what was sent: compare their own checksums with those of the sent weights.

SGLang's /weights_checker returns the SHA-256 (first 8 bytes) of every parameter of every tensor-parallel rank. SGLang
fuses and shards what it loads, so the same is done here with what is sent, one tensor at a time (families/engine.py).
The check is for engines on a CPU: on CUDA SGLang pads differently and hashes with a kernel of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from owpo_megatron.errors import EngineError
from owpo_megatron.sync.push import WeightEngine

_SHOWN = 5  # names in a message


class Layout(Protocol):
    """Layout of HF tensors in an engine (families.EngineLayout)."""

    def sent(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights as engines get them."""

    def parameter(self, name: str) -> tuple[str, int]:
        """The engine's parameter that holds an HF tensor, and the tensor's place in it."""

    def shard(self, name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """The share of an HF tensor that a tensor-parallel rank holds."""


class EngineHashes:
    """Hashes the weights of a push, then compares every engine's checksums.

    Args:
        engines: the engines that receive the push.
        layout: the model's tensors in the engine.
    """

    def __init__(self, engines: Sequence[WeightEngine], layout: Layout):
        self._engines, self._layout = engines, layout

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Hash each pair and yield it unchanged."""
        places = [(rank, ranks) for ranks in {engine.tp_size for engine in self._engines} for rank in range(ranks)]
        self._expected: dict[tuple[int, int], dict[str, _InOrder]] = {place: {} for place in places}
        for name, tensor in weights:
            param, position = self._layout.parameter(name)
            for rank, ranks in places:
                digest = self._expected[rank, ranks].setdefault(param, _InOrder())
                digest.add(position, self._layout.shard(name, tensor, rank, ranks))
            yield name, tensor

    def check(self) -> None:
        """Compare; raises EngineError naming the engine and the parameters that differ."""
        sent = {place: {name: d.result() for name, d in digests.items()} for place, digests in self._expected.items()}
        for engine in self._engines:
            for rank, found in enumerate(engine.checksums()):
                wrong = _differing(sent[rank, engine.tp_size], found)
                if wrong:
                    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
                    raise EngineError(
                        f"engine {engine.url}, rank {rank}, does not hold the weights it was sent: "
                        f"{', '.join(wrong[:_SHOWN])}{more}"
                    )


class _InOrder:
    """SHA-256 over numbered pieces that may be added in any order."""

    def __init__(self) -> None:
        self._hash, self._next = hashlib.sha256(), 0
        self._waiting: dict[int, torch.Tensor] = {}

    def add(self, place: int, piece: torch.Tensor) -> None:
        self._waiting[place] = piece
        while self._next in self._waiting:
            ready = self._waiting.pop(self._next).detach().contiguous().cpu()
            self._hash.update(ready.reshape(-1).view(torch.uint8).numpy().data)
            self._next += 1

    def result(self) -> str:
        """Return the digest in SGLang's format; empty, which equals no digest, while a piece is missing."""
        return "" if self._waiting else self._hash.digest()[:8].hex()


def _differing(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    names = sorted(wanted.keys() | found.keys())
    # a tied head may be sent although it is not a parameter of the engine
    absent = {"lm_head.weight"} - found.keys()
    return [name for name in names if wanted.get(name) != found.get(name) and name not in absent]
