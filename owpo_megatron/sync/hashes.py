"""Whether an engine has bit for bit what it was sent: its own checksums against those of what went out.

SGLang's /weights_checker gives SHA-256 (the first 8 bytes) of every parameter of every tensor-parallel rank. It fuses
and cuts what it loads, so the same is done here with what is sent, one tensor at a time:

    q_proj, k_proj, v_proj -> qkv_proj        rows of a rank's heads; key-value heads repeat where ranks outnumber them
    gate_proj, up_proj -> gate_up_proj        rows
    o_proj, down_proj                         columns
    embed_tokens, lm_head                     rows of the vocabulary, padded with zeros to a multiple of 64
    experts.N.gate_proj, up_proj -> experts.w13_weight, experts.N.down_proj -> experts.w2_weight, expert by expert

For engines on a CPU: on CUDA SGLang hashes with a kernel of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from owpo_megatron.errors import EngineError
from owpo_megatron.sync.push import WeightEngine

VOCABULARY_MULTIPLE = 64
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
    """Follows the weights of a push, then asks every engine.

    Args:
        engines: those that are pushed to, all with the same number of tensor-parallel ranks.
        num_kv_heads: of the model.
    """

    def __init__(self, engines: Sequence[WeightEngine], num_kv_heads: int):
        self._engines, self._num_kv_heads = engines, num_kv_heads

    def follow(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same pairs, hashed as they pass."""
        ranks = self._engines[0].tp_size
        self._expected: list[dict[str, _InOrder]] = [{} for _ in range(ranks)]
        for name, tensor in weights:
            param, place = engine_parameter(name)
            for rank in range(ranks):
                part = shard(name, tensor, rank, ranks, self._num_kv_heads)
                self._expected[rank].setdefault(param, _InOrder()).add(place, part)
            yield name, tensor

    def check(self) -> None:
        """Raises EngineError that names the engine and the parameters which are not what was sent."""
        expected = [{name: digest.result() for name, digest in rank.items()} for rank in self._expected]
        for engine in self._engines:
            for rank, (wanted, found) in enumerate(zip(expected, engine.checksums(), strict=True)):
                wrong = _differing(wanted, found)
                if wrong:
                    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
                    raise EngineError(
                        f"engine {engine.url}, rank {rank}, has other weights than it was sent: "
                        f"{', '.join(wrong[:_SHOWN])}{more}"
                    )


def engine_parameter(name: str) -> tuple[str, int]:
    """SGLang's parameter that holds a HF tensor, and the tensor's place in it."""
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
    """What a tensor-parallel rank of SGLang holds of a HF tensor."""
    module = name.split(".")[-2]
    if module in ("embed_tokens", "lm_head"):
        rows = -(-len(tensor) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // ranks
        mine = tensor[rank * rows : (rank + 1) * rows]
        return torch.nn.functional.pad(mine, (0, 0, 0, rows - len(mine)))
    if module in ("k_proj", "v_proj") and ranks > num_kv_heads:
        return tensor.chunk(num_kv_heads)[rank * num_kv_heads // ranks]
    if module in _FUSED:
        return tensor.chunk(ranks)[rank]
    if module in ("o_proj", "down_proj") and tensor.dim() == 2:
        return tensor.chunk(ranks, dim=1)[rank]
    return tensor


class _InOrder:
    """SHA-256 of pieces that may come in any order."""

    def __init__(self) -> None:
        self._hash, self._next = hashlib.sha256(), 0
        self._waiting: dict[int, torch.Tensor] = {}

    def add(self, place: int, piece: torch.Tensor) -> None:
        self._waiting[place] = piece
        while self._next in self._waiting:
            ready = self._waiting.pop(self._next).detach().contiguous().cpu()
            self._hash.update(ready.reshape(-1).view(torch.uint8).numpy())
            self._next += 1

    def result(self) -> str:
        """As SGLang writes it; empty, and so equal to nothing, where a piece has not come."""
        return "" if self._waiting else self._hash.digest()[:8].hex()


def _differing(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    names = sorted(wanted.keys() | found.keys())
    # a tied head may be sent, and is no parameter of the engine
    absent = {"lm_head.weight"} - found.keys()
    return [name for name in names if wanted.get(name) != found.get(name) and name not in absent]
