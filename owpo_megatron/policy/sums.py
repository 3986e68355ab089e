"""Sums over an update's tokens, for the metrics: of one microbatch, of a rank, of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from owpo_megatron.head import HeadLoss
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.types import TokenBatch


def microbatch_sums(batch: TokenBatch, out: HeadLoss) -> dict[str, torch.Tensor]:
    """Return one microbatch's contribution to the metrics of an update."""
    assert batch.behaviour_logp_T is not None
    old_logp_T = out.logp_T if batch.old_logp_T is None else batch.old_logp_T
    gap_T = (old_logp_T - batch.behaviour_logp_T).abs()
    if batch.external_T is not None:
        gap_T = gap_T.masked_fill(batch.external_T, 0)  # no engine sampled these
    counted = batch.mask_T if batch.counted_R is None else batch.counted_R
    sums = out.metrics | {
        "loss_sum": out.loss_sum,
        "loss_count": out.count,
        "entropy_sum": out.entropy_T[counted].double().sum(),
        "mismatch_sum": gap_T[counted].double().sum(),
        "head_rows": torch.tensor(out.rows.forward),
        "head_gradient_rows": torch.tensor(out.rows.gradient),
    }
    return {name: value.detach().double() for name, value in sums.items()}


def over_ranks(topology: Topology, collected: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Sum the last stages' sums over microbatches, then over data-parallel ranks in rank order, on every rank."""
    speaks = topology.is_last_stage and topology.tp_rank == 0
    own = {name: value.tolist() for name, value in _added(collected if speaks else []).items()}
    gathered = [
        {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        for sums in topology.all_gather(own)
    ]
    return {name: value.tolist() for name, value in _added(gathered).items()}


def _added(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The sum of each name's values, in this order."""
    totals: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in part.items():
            totals[name] = totals[name] + value if name in totals else value
    return totals
