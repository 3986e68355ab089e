"""megatron-core's own cross-entropy, for comparison with the head in `owpo bench head`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from owpo_megatron.config import ParallelConfig
from owpo_megatron.mcore.topology import init_topology


def one_rank_cross_entropy() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a function (logits [T, 1, V], target [T, 1]) -> loss [T, 1], on a tensor-parallel group of one process.

    It overwrites the logits. Starts process groups, which last until the process ends.
    """
    init_topology(ParallelConfig(), seed=1)
    return vocab_parallel_cross_entropy
