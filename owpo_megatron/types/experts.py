"""Experts of a mixture that routers chose: which layers have them, and the choice for each token that a model read."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


@dataclass(frozen=True)
class ExpertShape:
    """The mixtures of a model.

    Example:
        Layers 1 to 3 of four choose two of 8 experts: ExpertShape(num_layers=4, layers=(1, 2, 3), number=8, chosen=2)
    """

    num_layers: int
    layers: tuple[int, ...]  # those with experts, from 0
    number: int  # experts of a layer
    chosen: int  # of them, for each token


class RoutedExperts:
    """Experts that an engine's routers chose, [tokens, layers with experts, chosen]: a byte each, or two above 256.

    The tokens are those that the engine read: prompt and response without its last token, which is only a target.

    Example:
        >>> RoutedExperts(3, 2, 2, array("B", [0, 1, 2, 3, 0, 2, 1, 3, 0, 1, 0, 1]))
        RoutedExperts(3 tokens, 2 layers, 2 experts)
    """

    __slots__ = ("_numbers", "chosen", "layers", "tokens")

    def __init__(self, tokens: int, layers: int, chosen: int, numbers: array[int]):
        assert len(numbers) == tokens * layers * chosen, (len(numbers), tokens, layers, chosen)
        self.tokens, self.layers, self.chosen = tokens, layers, chosen
        self._numbers = numbers

    @classmethod
    def of(cls, expert_TLK: numpy.ndarray, number: int) -> RoutedExperts:
        """Take over integers below `number`, [tokens, layers, chosen]."""
        code, kind = ("B", "uint8") if number <= 256 else ("h", "int16")
        numbers = array(code)
        numbers.frombytes(expert_TLK.astype(kind).tobytes())
        tokens, layers, chosen = expert_TLK.shape
        return cls(tokens, layers, chosen, numbers)

    def tensor(self) -> torch.Tensor:
        """[tokens, layers, chosen] uint8 or int16, without a copy: not to be written to."""
        import torch

        dtype = torch.uint8 if self._numbers.typecode == "B" else torch.int16
        shape = (self.tokens, self.layers, self.chosen)
        return (
            torch.frombuffer(self._numbers, dtype=dtype).view(shape)
            if self._numbers
            else torch.empty(shape, dtype=dtype)
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutedExperts):
            return NotImplemented
        return self._shape == other._shape and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash(self._shape)

    def __reduce__(self) -> tuple[type[RoutedExperts], tuple[int, int, int, array[int]]]:
        return RoutedExperts, (*self._shape, self._numbers)

    def __repr__(self) -> str:
        return f"RoutedExperts({self.tokens} tokens, {self.layers} layers, {self.chosen} experts)"

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.tokens, self.layers, self.chosen
