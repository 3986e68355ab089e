"""Log-probs without gradients: the old policy, the reference, evaluation."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist

from owpo_megatron.head.backend import ForwardBackend, wide
from owpo_megatron.head.fp8 import Fp8Weight
from owpo_megatron.head.logprobs import ExactLogProbs, LogProbs, RawLogProbs, RefinedLogProbs
from owpo_megatron.head.select import BackendName, exact_backend, fp8_backend
from owpo_megatron.head.shard import VocabShard
from owpo_megatron.types import LogpMode

_TYPE: dict[LogpMode, type[LogProbs]] = {"exact": ExactLogProbs, "fp8_refined": RefinedLogProbs, "fp8_raw": RawLogProbs}


@overload
def logprob(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, *, mode: Literal["exact"] = ...,
    temperature: float = ..., vocab_size: int | None = ..., group: dist.ProcessGroup | None = ...,
    chunk_rows: int | None = ..., row_mask_T: torch.Tensor | None = ..., fp8_weight: Fp8Weight | None = ...,
    backend_name: BackendName = ...,
) -> ExactLogProbs: ...  # fmt: skip


@overload
def logprob(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, *, mode: Literal["fp8_refined"],
    temperature: float = ..., vocab_size: int | None = ..., group: dist.ProcessGroup | None = ...,
    chunk_rows: int | None = ..., row_mask_T: torch.Tensor | None = ..., fp8_weight: Fp8Weight | None = ...,
    backend_name: BackendName = ...,
) -> RefinedLogProbs: ...  # fmt: skip


@overload
def logprob(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, *, mode: LogpMode,
    temperature: float = ..., vocab_size: int | None = ..., group: dist.ProcessGroup | None = ...,
    chunk_rows: int | None = ..., row_mask_T: torch.Tensor | None = ..., fp8_weight: Fp8Weight | None = ...,
    backend_name: BackendName = ...,
) -> LogProbs: ...  # fmt: skip


@torch.no_grad()
def logprob(
    h_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    *,
    mode: LogpMode = "exact",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    row_mask_T: torch.Tensor | None = None,
    fp8_weight: Fp8Weight | None = None,
    backend_name: BackendName = "auto",
) -> LogProbs:
    """Log-prob of `target_T`, entropy and log-sum-exp of softmax(h weight^T / temperature).

    Args:
        h_TH: final hidden states, the same on every rank of `group`.
        weight_VH: this rank's rows of the output embedding; rank r holds global rows r V .. (r + 1) V - 1.
        target_T: int64 global token ids; read only where `row_mask_T`.
        mode: "exact", "fp8_refined" or "fp8_raw"; the result's type says which.
        temperature: divides the logits, for log-probs and entropies alike.
        vocab_size: true size of the whole vocabulary; rows of the weight beyond it are padding and take no part.
        group: tensor-parallel group; None: the weight is whole.
        chunk_rows: rows whose logits exist at the same time; None: what suits the device.
        row_mask_T: bool; other rows are skipped and are zero in the result. Must be the same on every rank.
        fp8_weight: the quantised weight, for the FP8 modes; None: `weight_VH` is quantised anew.
        backend_name: "torch" or "triton" instead of what suits the device.

    Returns:
        float32 results, or float64 for float64 inputs: the same on every rank of `group`, and the same bits as
        `policy_head` gives for the same rows, chunks and mode. One collective, of four floats a row and rank.
    """
    shard = VocabShard(weight_VH.shape[0], vocab_size, group)
    valid_VH = weight_VH[: shard.valid_rows]
    if mode == "exact":
        backend: ForwardBackend = exact_backend(valid_VH, 1.0 / temperature, backend_name)
    else:
        backend = fp8_backend(valid_VH, fp8_weight, 1.0 / temperature, mode == "fp8_refined", backend_name)
    rows_R = None if row_mask_T is None else row_mask_T.nonzero()[:, 0]
    h_RH, column_R = pick(h_TH, rows_R), shard.column(pick(target_T, rows_R))
    slices = row_slices(h_RH.shape[0], chunk_rows or backend.chunk_rows(shard.local_rows))
    local_4R = torch.empty(4, h_RH.shape[0], dtype=wide(h_TH), device=h_TH.device)
    for chunk, logits in zip(slices, backend.chunks(h_RH, column_R, slices), strict=True):
        local_4R[:, chunk] = logits.stats()
    stats = shard.combine(local_4R)
    found = [stats.logp_C, stats.entropy_C, stats.lse_C]
    if rows_R is not None:
        found = [value_R.new_zeros(h_TH.shape[0]).index_copy_(0, rows_R, value_R) for value_R in found]
    return _TYPE[mode](*found)


def row_slices(count: int, chunk_rows: int) -> list[slice]:
    return [slice(start, min(start + chunk_rows, count)) for start in range(0, count, chunk_rows)]


def pick(value_T: torch.Tensor, rows_R: torch.Tensor | None) -> torch.Tensor:
    """The chosen rows; None: all of them, without a copy."""
    return value_T if rows_R is None else value_T[rows_R]
