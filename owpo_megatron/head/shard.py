"""The part of the vocabulary that one tensor-parallel rank holds, and how the parts of a softmax are put together.

Shapes: C rows (tokens), K tensor-parallel ranks, V rows of the weight on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class RowStats:
    """Statistics of some rows' logits over the whole vocabulary; all [C], with the same bits on every rank."""

    lse_C: torch.Tensor
    logp_C: torch.Tensor
    entropy_C: torch.Tensor
    best_C: torch.Tensor  # the largest log-prob


@dataclass(frozen=True)
class VocabShard:
    """Rank r of `group` holds global rows r * local_rows .. (r + 1) * local_rows - 1 of the output embedding.

    Args:
        vocab_size: true size of the whole vocabulary; rows beyond it are padding. None: nothing is padded.
        group: tensor-parallel group; None: the weight is whole.
    """

    local_rows: int
    vocab_size: int | None = None
    group: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def offset(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group) * self.local_rows

    @property
    def valid_rows(self) -> int:
        """Rows of this rank's weight that are not padding; padding is at the end of the whole vocabulary."""
        if self.vocab_size is None:
            return self.local_rows
        assert self.vocab_size <= self.local_rows * self.ranks, (
            f"{self.ranks} ranks of {self.local_rows} rows cannot hold a vocabulary of {self.vocab_size}"
        )
        return min(max(self.vocab_size - self.offset, 0), self.local_rows)

    @property
    def vocabulary(self) -> int:
        """Size of the whole vocabulary, without padding."""
        return self.local_rows * self.ranks if self.vocab_size is None else self.vocab_size

    def column(self, target_C: torch.Tensor) -> torch.Tensor:
        """Column of each target on this rank, -1 where another rank has it."""
        column_C = target_C - self.offset
        return column_C.masked_fill((column_C < 0) | (column_C >= self.valid_rows), -1)

    def combine(self, local_4C: torch.Tensor) -> RowStats:
        """Combine each rank's statistics over the vocabulary: one collective of four numbers per row.

        Args:
            local_4C: this rank's statistics: max m, sum e^(z - m), the target's z (0 if another rank has it),
                sum (z - m) e^(z - m). m is the most negative number where there is no column.
        """
        return self.combined(self._gather(local_4C))

    @staticmethod
    def combined(part_K4C: torch.Tensor) -> RowStats:
        """The same of all ranks' statistics."""
        max_KC, sum_KC, target_KC, moment_KC = part_K4C.unbind(dim=1)
        max_C = max_KC.amax(dim=0)
        shift_KC = max_KC - max_C
        scale_KC = shift_KC.exp()
        # A rank of padding only adds exp(most negative) * 0, and its shift times 0.
        sum_C = (scale_KC * sum_KC).sum(dim=0)
        moment_C = (scale_KC * (moment_KC + shift_KC * sum_KC)).sum(dim=0)
        log_sum_C = sum_C.log()
        # (z_y - max) - log sum, not z_y - lse: keeps the digits of a log-prob near 0
        logp_C = (target_KC.sum(dim=0) - max_C) - log_sum_C
        return RowStats(max_C + log_sum_C, logp_C, log_sum_C - moment_C / sum_C, -log_sum_C)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's `value`, on every rank."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def added(self, local_C: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's numbers, in rank order: the same bits on every rank."""
        return self._gather(local_C).sum(dim=0)

    def _gather(self, local: torch.Tensor) -> torch.Tensor:
        """[K, ...]. Every rank then does the same arithmetic, hence gets the same bits."""
        if self.group is None:
            return local[None]
        part_K = local.new_empty(self.ranks, *local.shape)
        dist.all_gather(list(part_K.unbind(0)), local, group=self.group)
        return part_K
