"""Check that engines hold bit for bit what was sent: compare their own checksums with those of the sent weights.

SGLang's /weights_checker returns the SHA-256 (first 8 bytes) of every parameter of every tensor-parallel rank. SGLang
fuses and shards what it loads, so the same is done here with what is sent, one tensor at a time:

    q_proj, k_proj, v_proj -> qkv_proj        rows, by key-value heads
    gate_proj, up_proj -> gate_up_proj        rows, by 32
    o_proj, down_proj                         columns, likewise
    embed_tokens, lm_head                     rows, with the vocabulary padded to a multiple of 64
    experts.N.gate_proj, up_proj -> experts.w13_weight, experts.N.down_proj -> experts.w2_weight, expert by expert

A shard that is not full is padded with zeros. This is SGLang's layout on a CPU, the only one that is checked: on CUDA
SGLang pads differently and hashes with a kernel of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from owpo_megatron.errors import EngineError
from owpo_megatron.sync.push import WeightEngine

VOCABULARY_MULTIPLE = 64
MLP_MULTIPLE = 32
_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_EXPERT_PART = {"gate": ("w13_weight", 2, 0), "up": ("w13_weight", 2, 1), "down": ("w2_weight", 1, 0)}
_SHOWN = 5  # names in a message


class EngineHashes:
    """Hashes the weights of a push, then compares every engine's checksums.

    Args:
        engines: the engines that receive the push.
        num_kv_heads: key-value heads of the model.
    """

    def __init__(self, engines: Sequence[WeightEngine], num_kv_heads: int):
        self._engines, self._num_kv_heads = engines, num_kv_heads

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Hash each pair and yield it unchanged."""
        places = [(rank, ranks) for ranks in {engine.tp_size for engine in self._engines} for rank in range(ranks)]
        self._expected: dict[tuple[int, int], dict[str, _InOrder]] = {place: {} for place in places}
        for name, tensor in weights:
            param, position = engine_parameter(name)
            for rank, ranks in places:
                digest = self._expected[rank, ranks].setdefault(param, _InOrder())
                digest.add(position, shard(name, tensor, rank, ranks, self._num_kv_heads))
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


def engine_parameter(name: str) -> tuple[str, int]:
    """Return the SGLang parameter that contains an HF tensor, and the tensor's position in it."""
    expert = _EXPERT.fullmatch(name)
    if expert:
        param, parts, part = _EXPERT_PART[expert[3]]
        return f"{expert[1]}.{param}", int(expert[2]) * parts + part
    *path, module, kind = name.split(".")
    if module in _FUSED:
        fused, place = _FUSED[module]
        return ".".join((*path, fused, kind)), place
    return name, 0


def shard(name: str, tensor: torch.Tensor, rank: int, ranks: int, num_kv_heads: int) -> torch.Tensor:
    """Return the shard of an HF tensor that a tensor-parallel rank of SGLang holds on a CPU."""
    module = name.split(".")[-2]
    dim = 1 if module in ("o_proj", "down_proj") and tensor.dim() == 2 else 0
    size = tensor.shape[dim]
    if module in ("embed_tokens", "lm_head"):
        share = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // ranks
    elif module in ("q_proj", "k_proj", "v_proj", "o_proj") and (dim or module != "o_proj"):
        share = -(-num_kv_heads // ranks) * (size // num_kv_heads)
    elif module in ("gate_proj", "up_proj", "down_proj") and (dim or module != "down_proj"):
        share = -(-size // (MLP_MULTIPLE * ranks)) * MLP_MULTIPLE
    else:
        return tensor
    first = min(rank * share, size)
    mine = tensor.narrow(dim, first, min(share, size - first))
    missing = share - mine.shape[dim]
    padding = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
    return torch.nn.functional.pad(mine, padding) if missing else mine


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
