"""A method's own statistic of the vocabulary, of one chunk: the sum goes over blocks of rows and over the ranks."""

from __future__ import annotations

import torch

from owpo_megatron.head.backend import ChunkLogits
from owpo_megatron.head.shard import RowStats, VocabShard
from owpo_megatron.methods.statistic import Statistic


def statistic_of(statistic: Statistic, logits: ChunkLogits, stats: RowStats, shard: VocabShard) -> torch.Tensor:
    """[C], the same bits on every rank: one more collective, of a number per row.

    Args:
        logits: the chunk's, after `stats` and before `dlogits`; made by `Backend.chunks(keeps_logits=True)`.
        stats: the chunk's, of the whole vocabulary.
    """
    sum_C = torch.zeros_like(stats.logp_C)
    for block, logp_BV in logits.log_probs(stats):
        sum_C[block] = statistic.terms(logp_BV, stats.best_C[block, None]).sum(dim=1)
    return statistic.value(shard.added(sum_C), stats.logp_C, stats.best_C, shard.vocabulary)
