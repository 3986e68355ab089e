"""Checkpoints that hold one tensor for all experts of a layer, seen as one tensor per expert.

Rules, hashes and proofs know single experts: `model.layers.3.mlp.experts.5.down_proj` is entry 5 of the checkpoint's
`model.layers.3.mlp.experts.down_proj`, of shape [experts, ...]. The two kinds of names never meet in one checkpoint
that has a tensor per expert: those names end in `.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

_MEMBER = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
_STACK = re.compile(r".*\.experts\.[a-z]\w*")


def stack_of(name: str) -> tuple[str, int] | None:
    """(the stack, the place in it) of one expert's tensor; None for any other tensor.

    Example:
        >>> stack_of("model.layers.3.mlp.experts.5.down_proj")
        ('model.layers.3.mlp.experts.down_proj', 5)
    """
    match = _MEMBER.fullmatch(name)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else None


def is_stack(name: str) -> bool:
    return _STACK.fullmatch(name) is not None


def member(stack: str, expert: int) -> str:
    """The name of one expert's tensor, the inverse of `stack_of`."""
    stem, _, kind = stack.rpartition(".")
    return f"{stem}.{expert}.{kind}"


def stacked_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint holds, from those of single experts and all others."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        stack = stack_of(name)
        if stack is None:
            found[name] = shape
        else:
            found[stack[0]] = (max(stack[1] + 1, found.get(stack[0], (0,))[0]), *shape)
    return found


def stacked(number: int, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) pairs as a checkpoint holds them: experts' tensors wait until all of their stack have come.

    Args:
        number: experts in a layer.
    """
    waiting: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in weights:
        stack = stack_of(name)
        if stack is None:
            yield name, tensor
            continue
        entries = waiting.setdefault(stack[0], {})
        entries[stack[1]] = tensor
        if len(entries) == number:
            del waiting[stack[0]]
            yield stack[0], torch.stack([entries[expert] for expert in range(number)])
    assert not waiting, f"experts are missing of {', '.join(waiting)}"
