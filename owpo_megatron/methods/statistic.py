"""A further statistic of the vocabulary per token, beside log-prob and entropy: what a method may ask of the head.

The head goes through the log-probs of a chunk in blocks of rows and sums over the vocabulary, over the tensor-parallel
ranks too; [T, V] never exists. Without gradient, as a method's entropies are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Statistic(Protocol):
    """value(sum over the vocabulary of terms(log p)); pure, and each row for itself.

    Shapes: B rows of a block, C rows of a chunk, V columns on this rank (there may be none).
    """

    def terms(self, logp_BV: torch.Tensor, best_B1: torch.Tensor) -> torch.Tensor:
        """[B, V], summed over the whole vocabulary; `best_B1` is the largest log-prob of each row, on any rank."""

    def value(self, sum_C: torch.Tensor, logp_C: torch.Tensor, best_C: torch.Tensor, vocab: int) -> torch.Tensor:
        """[C], from the sums, the token's own log-prob, the largest one, and the size of the vocabulary."""


@dataclass(frozen=True)
class MeanLogProb:
    """Mean of log p over the vocabulary."""

    def terms(self, logp_BV: torch.Tensor, best_B1: torch.Tensor) -> torch.Tensor:
        return logp_BV

    def value(self, sum_C: torch.Tensor, logp_C: torch.Tensor, best_C: torch.Tensor, vocab: int) -> torch.Tensor:
        return sum_C / vocab


@dataclass(frozen=True)
class MinPLogProb:
    """Log-prob of the token after min-p filtering: log p - log(mass of the tokens kept), -inf if it is filtered out.

    Args:
        kappa: tokens with p >= kappa times the largest p are kept; 0: all.
    """

    kappa: float

    def terms(self, logp_BV: torch.Tensor, best_B1: torch.Tensor) -> torch.Tensor:
        return logp_BV.exp().masked_fill(logp_BV < best_B1 + self._cut, 0)

    def value(self, sum_C: torch.Tensor, logp_C: torch.Tensor, best_C: torch.Tensor, vocab: int) -> torch.Tensor:
        return (logp_C - sum_C.log()).masked_fill(logp_C < best_C + self._cut, -math.inf)

    @property
    def _cut(self) -> float:
        return math.log(self.kappa) if self.kappa else -math.inf
