"""A rank's part of a pack under context parallelism.

Every sequence is padded to a multiple of 2 cp tokens and cut into 2 cp chunks; rank r of cp has chunks r and
2 cp - 1 - r of each, one after the other. Later tokens attend to more keys, so that all ranks have the same work. This
is the order of Transformer Engine's `thd_get_partitioned_indices`, which megatron-core splits packs by
(`get_thd_batch_on_this_cp_rank`), and which its rotary embeddings and attention expect.

Shapes: T tokens of the whole pack, O = T / cp of them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, LatentAttention
from owpo_megatron.types import TokenBatch


@dataclass(frozen=True)
class Context:
    """Context parallelism of a rank; the default: none."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def multiple(self) -> int:
        """Tokens that every sequence is padded to a multiple of."""
        return 2 * self.size if self.size > 1 else 1


def zigzag_rows(lengths: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Return the places in the pack, [O] int64, of this rank's tokens.

    Args:
        lengths: tokens of each sequence, padding included.

    Example:
        >>> zigzag_rows([8, 4], 2, 0).tolist(), zigzag_rows([8, 4], 2, 1).tolist()
        ([0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10])
    """
    rows, start = [], 0
    for length in lengths:
        assert length % (2 * size) == 0, f"a sequence of {length} tokens was not padded for {size} ranks"
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            rows.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return torch.cat(rows)


def gathered_order(lengths: Sequence[int], size: int) -> torch.Tensor:
    """Return where each token of the pack, [T], is among the parts of all ranks, one after the other.

    Example:
        >>> gathered_order([4], 2).tolist()  # rank 0 has tokens 0 and 3, rank 1 has 1 and 2
        [0, 2, 3, 1]
    """
    return torch.cat([zigzag_rows(lengths, size, rank) for rank in range(size)]).argsort()


class ContextPart:
    """This rank's rows of one pack.

    Args:
        lengths: tokens of each sequence of the pack, padding included.
    """

    def __init__(self, context: Context, lengths: Sequence[int]):
        self._context, self._lengths = context, lengths
        self.row_O = zigzag_rows(lengths, context.size, context.rank)

    def own(self, value_T: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor of the whole pack."""
        return value_T[self.row_O.to(value_T.device)]

    def whole(self, value_O: torch.Tensor) -> torch.Tensor:
        """The whole pack's rows, [T, ...], from what the ranks have. Collective; without gradients."""
        parts = [torch.empty_like(value_O) for _ in range(self._context.size)]
        dist.all_gather(parts, value_O.contiguous(), group=self._context.group)
        return torch.cat(parts)[gathered_order(self._lengths, self._context.size).to(value_O.device)]

    def own_batch(self, batch: TokenBatch) -> TokenBatch:
        """This rank's rows of the loss's inputs, with the length of every sample, which no rank can see in its part.

        Samples are counted by the first of the ranks, and tokens by each its own.
        """
        rows: dict[str, Any] = {
            name: self.own(value) for name, value in vars(batch).items() if name.endswith("_T") and value is not None
        }
        counted_T = batch.mask_T
        count_S = torch.zeros(batch.num_samples, dtype=torch.int64).index_add(
            0, batch.sample_T[counted_T], torch.ones(int(counted_T.sum()), dtype=torch.int64)
        )
        given = None if batch.given is None else {name: self.own(value) for name, value in batch.given.items()}
        counts = self._context.rank == 0
        return replace(batch, **rows, given=given, count_S=count_S, counts_samples=counts, counted_R=None)


def check_context_attention(model: HFModel, cp: int, tp: int, comm_type: str | None) -> None:
    """Refuse what Transformer Engine 2.11 cannot compute with context parallelism over packed sequences.

    The attention of a CPU, which gathers all keys, has none of these limits.

    Args:
        comm_type: `megatron.cp_comm_type`; None: megatron-core's default, p2p.

    Raises:
        UserError: naming parallel.cp or megatron.cp_comm_type.
    """
    if cp == 1:
        return
    field, found, attention = "megatron.cp_comm_type", comm_type or "p2p", model.attention
    if found not in ("p2p", "a2a"):
        raise UserError(field, found, "Transformer Engine has p2p and a2a for packed sequences; use one of them")
    if attention.sinks:
        remedy = f"Transformer Engine lacks {model.family_name}'s attention sinks for packed sequences; use 1"
        raise UserError("parallel.cp", cp, remedy)
    if attention.window is not None and found != "a2a":
        raise UserError(field, found, f"{model.family_name} has layers with a window, which need a2a")
    if isinstance(attention, LatentAttention) and found != "p2p":
        raise UserError(field, found, f"{model.family_name}'s latent attention needs p2p")
    if found == "a2a" and attention.num_kv_heads // tp % cp:
        remedy = f"a2a splits the {attention.num_kv_heads // tp} key-value heads of a rank among parallel.cp = {cp}"
        raise UserError(field, found, f"{remedy}; it must divide them, or use p2p")
