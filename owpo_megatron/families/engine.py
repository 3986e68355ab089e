"""Layout of an HF checkpoint's tensors in an SGLang engine: its parameters' names, and the shard of each rank.

SGLang fuses and cuts what it loads:

    q_proj, k_proj, v_proj -> qkv_proj        rows, by key-value heads
    gate_proj, up_proj -> gate_up_proj        rows, by 32
    o_proj, down_proj                         columns, by the same
    embed_tokens, lm_head                     rows, of a vocabulary padded to a multiple of 64
    experts.N.gate_proj, up_proj -> experts.w13_weight, experts.N.down_proj -> experts.w2_weight, expert by expert
    experts.gate_up_proj, down_proj -> the same, where they hold all experts transposed, and their biases

A rank whose share is not full has zeros behind it. This is SGLang's layout on a CPU (on CUDA it pads differently), and
known for experts whose ffn size is a multiple of 32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from owpo_megatron.families.attention import LatentAttention
from owpo_megatron.families.family import EngineNames
from owpo_megatron.families.model import HFModel
from owpo_megatron.families.rules import HF, HF_EMBEDDING, LM_HEAD
from owpo_megatron.families.stacks import is_stack

_BY_HEADS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")
VOCABULARY_MULTIPLE = 64
MLP_MULTIPLE = 32
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class EngineLayout:
    """A model's tensors in the engine.

    Example:
        EngineLayout.of(model).parameter("model.layers.0.self_attn.k_proj.weight")
        # ("model.layers.0.self_attn.qkv_proj.weight", 1)
    """

    num_kv_heads: int
    names: EngineNames = EngineNames()
    fused: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    sends_head: bool = False  # the embedding once more, for an engine that does not tie its head to it

    @classmethod
    def of(cls, model: HFModel) -> EngineLayout:
        names = model.family.engine
        if isinstance(model.attention, LatentAttention) and model.attention.q_rank is None:
            # nothing to fuse the compressed keys and values with
            names = replace(names, fused={k: v for k, v in names.fused.items() if k != "kv_a_proj_with_mqa"})
        fused = tuple(_fused_tensors(model).items())
        return cls(model.attention.num_kv_heads, names, fused, model.tied and not names.ties)

    def sent(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs as engines get them: what a checkpoint fuses comes apart.

        SGLang has loaders for both forms; on a CPU, where it pads shares, the one for fused tensors fails.
        """
        fused = dict(self.fused)
        for name, tensor in weights:
            parts = fused.get(name, ())
            if not parts:
                yield name, tensor
            if self.sends_head and name == HF_EMBEDDING:
                yield LM_HEAD, tensor
            for (part, _), rows in zip(parts, tensor.split([rows for _, rows in parts]) if parts else (), strict=True):
                yield part, rows

    def parameter(self, name: str) -> tuple[str, int]:
        """SGLang's parameter that holds an HF tensor, and the tensor's place in it."""
        expert = _EXPERT.fullmatch(name)
        if expert and expert[3] in self.names.expert:
            part = self.names.expert.index(expert[3])
            stem, number = expert[1], int(expert[2])
            return (f"{stem}.w13_weight", 2 * number + part) if part < 2 else (f"{stem}.w2_weight", number)
        if is_stack(name):
            stem, _, stack = name.rpartition(".")
            return f"{stem}.{_STACKS[stack]}", 0
        *path, module, kind = name.split(".")
        if module in self.names.fused:
            fused, place = self.names.fused[module]
            return ".".join((*path, fused, kind)), place
        return name, 0

    def shard(self, name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """Return a tensor-parallel rank's shard of an HF tensor."""
        if is_stack(name):
            return _shard_of_stack(name.rpartition(".")[2], tensor, rank, ranks)
        module = name.split(".")[-2]
        gate, up, down = self.names.expert
        is_down = module in ("down_proj", down)
        dim = 1 if (module == "o_proj" or is_down) and tensor.dim() == 2 else 0
        size = tensor.shape[dim]
        if module in ("embed_tokens", "lm_head"):
            share = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // ranks
        elif module in _BY_HEADS or (module == "o_proj" and dim) or name.endswith(".sinks"):
            share = -(-self.num_kv_heads // ranks) * (size // self.num_kv_heads)
        elif module in ("gate_proj", "up_proj", gate, up) or (is_down and dim):
            share = -(-size // (MLP_MULTIPLE * ranks)) * MLP_MULTIPLE
        else:
            return tensor
        return _share_of(tensor, dim, rank, share)


def _share_of(tensor: torch.Tensor, dim: int, rank: int, share: int) -> torch.Tensor:
    size = tensor.shape[dim]
    first = min(rank * share, size)
    mine = tensor.narrow(dim, first, min(share, size - first))
    missing = share - mine.shape[dim]
    padding = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
    return torch.nn.functional.pad(mine, padding) if missing else mine


_STACKS = {
    "gate_up_proj": "w13_weight",
    "gate_up_proj_bias": "w13_weight_bias",
    "down_proj": "w2_weight",
    "down_proj_bias": "w2_weight_bias",
}


def _shard_of_stack(stack: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The shard of all experts' tensors [experts, ...], in which gate and up projection alternate (gpt-oss)."""
    if stack == "down_proj_bias":  # added once
        return tensor if rank == 0 else torch.zeros_like(tensor)
    rows = 1 if stack == "down_proj" else 2  # for each dimension between the projections
    tensor = tensor.transpose(1, 2) if tensor.dim() == 3 else tensor
    dim = 2 if stack == "down_proj" else 1
    share = -(-tensor.shape[dim] // (rows * MLP_MULTIPLE * ranks)) * MLP_MULTIPLE * rows
    return _share_of(tensor, dim, rank, share)


_APART = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def _fused_tensors(model: HFModel) -> dict[str, tuple[tuple[str, int], ...]]:
    """HF name of a fused tensor -> (name, rows) of its parts, for every layer."""
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for rule in model.rules:
        fused = rule.hf[0].name.removeprefix(HF).removesuffix(".weight")
        if len({part.name for part in rule.hf}) == len(rule.hf) or fused not in _APART:
            continue
        stem = fused.rpartition(".")[0]
        for layer in range(model.num_layers):
            parts = zip(_APART[fused], (model.size(part.shape[0]) for part in rule.hf), strict=True)
            found[rule.hf[0].name.format(layer=layer)] = tuple(
                (f"{HF.format(layer=layer)}{stem}.{name}.weight", rows) for name, rows in parts
            )
    return found
