"""The head of a training step: log-probs, loss, and the gradients of h and W, which are formed in the forward.

As soon as a chunk's log-probs are known so is d loss / d logp, and the chunk's logits are still there: no logit is
computed twice (6 T V H instead of 8), and rows without gradient leave before the two backward GEMMs.
Shapes: T rows (tokens), R rows that take part, C rows of a chunk, K rows with gradient, H hidden, V rows of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from owpo_megatron.head.backend import wide
from owpo_megatron.head.logprob import pick, row_slices
from owpo_megatron.head.logprobs import check_batch
from owpo_megatron.head.objective import logp_gradient
from owpo_megatron.head.select import BackendName, exact_backend
from owpo_megatron.head.shard import VocabShard
from owpo_megatron.types import Objective, TokenBatch

BatchOf = Callable[[torch.Tensor], TokenBatch]
"""The batch for given log-probs [T]: where no old pass was spent, old is the current policy itself."""


@dataclass(frozen=True)
class HeadRows:
    """How many rows went where."""

    total: int
    forward: int  # of the row mask
    gradient: int  # that had a gradient, of these


@dataclass(frozen=True)
class PolicyHeadOut:
    """What `policy_head` gives. Everything but `loss_sum` is detached."""

    loss_sum: torch.Tensor  # differentiable in h and the weight
    num_tokens: torch.Tensor
    metrics: dict[str, torch.Tensor]
    batch: TokenBatch
    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    rows: HeadRows


def policy_head(
    h_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    batch: TokenBatch | BatchOf,
    objective: Objective,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    row_mask_T: torch.Tensor | None = None,
    skip_zero_rows: bool = True,
    entropy_bonus: float = 0.0,
    into_main_grad: bool = True,
    upstream: float = 1.0,
    backend_name: BackendName = "auto",
) -> PolicyHeadOut:
    """The objective's loss on softmax(h weight^T / temperature), with the gradients of h and the weight.

    Args:
        h_TH, weight_VH, target_T, temperature, vocab_size, group, chunk_rows, row_mask_T, backend_name: as for
            `logprob`.
        batch: the objective's inputs, or a function that gives them for log-probs [T]. Its values must be the same on
            every rank of `group`: they decide which rows leave.
        objective: its loss must be a sum of terms that each depend on one token's log-prob.
        skip_zero_rows: rows whose gradient is exactly zero (advantage 0, clipped, masked) skip the backward GEMMs.
        entropy_bonus: loss_sum also gets -entropy_bonus times the sum of the entropies over `batch.mask_T`.
        into_main_grad: add the weight's gradient to `weight_VH.main_grad` where it exists (megatron's buffer), during
            this call; the backward then only reports it as added, as megatron's own linear layers do.
        upstream: d total / d loss_sum, which must be known by now when the gradient goes to main_grad; the backward
            asserts it.

    Raises:
        TypeError: the batch's log-probs are of a mode that no ratio may be formed of.

    The gradient of h is this rank's PARTIAL sum (over its part of the vocabulary): the caller reduces it over `group`,
    as megatron's copy-to / gather-from regions in front of the output layer do. The gradient of the weight is complete.
    """
    batch_of = batch if callable(batch) else lambda _: batch
    wanted = torch.is_grad_enabled() and h_TH.requires_grad, torch.is_grad_enabled() and weight_VH.requires_grad
    main_grad = getattr(weight_VH, "main_grad", None) if into_main_grad and wanted[1] else None
    with torch.no_grad():
        out, dh_TH, dweight_VH = _form(
            h_TH, weight_VH, target_T, batch_of, objective, wanted, main_grad,
            inverse_temperature=1.0 / temperature, shard=VocabShard(weight_VH.shape[0], vocab_size, group),
            chunk_rows=chunk_rows, row_mask_T=row_mask_T, skip_zero_rows=skip_zero_rows, entropy_bonus=entropy_bonus,
            scale=upstream if main_grad is not None else 1.0, backend_name=backend_name,
        )  # fmt: skip
    if not any(wanted):
        return out
    formed = _Formed(dh_TH, dweight_VH, main_grad is not None, upstream)
    return PolicyHeadOut(**vars(out) | {"loss_sum": _Attach.apply(h_TH, weight_VH, out.loss_sum, formed)})


def _form(
    h_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    batch_of: BatchOf,
    objective: Objective,
    wanted: tuple[bool, bool],
    main_grad: torch.Tensor | None,
    *,
    inverse_temperature: float,
    shard: VocabShard,
    chunk_rows: int | None,
    row_mask_T: torch.Tensor | None,
    skip_zero_rows: bool,
    entropy_bonus: float,
    scale: float,
    backend_name: BackendName,
) -> tuple[PolicyHeadOut, torch.Tensor | None, torch.Tensor | None]:
    """(out with a detached loss, dh, dweight); gradients times `scale`, None where not wanted or in main_grad."""
    want_h, want_weight = wanted
    valid = shard.valid_rows
    backend = exact_backend(weight_VH[:valid], inverse_temperature, backend_name)
    rows_R = None if row_mask_T is None else row_mask_T.nonzero()[:, 0]
    h_RH, column_R = pick(h_TH, rows_R), shard.column(pick(target_T, rows_R))
    slices = row_slices(h_RH.shape[0], chunk_rows or backend.chunk_rows(shard.local_rows))

    logp_T = torch.zeros(h_TH.shape[0], dtype=wide(h_TH), device=h_TH.device)
    entropy_T = torch.zeros_like(logp_T)
    dh_TH = torch.zeros_like(h_TH) if want_h else None
    dweight_VH = None
    if want_weight and (main_grad is None or main_grad.dtype != wide(h_TH)):
        dweight_VH = torch.zeros(weight_VH.shape, dtype=wide(h_TH), device=h_TH.device)
    sum_VH = dweight_VH if dweight_VH is not None else main_grad
    kept = 0
    for chunk, logits in zip(slices, backend.chunks(h_RH, column_R, slices, entropy_bonus != 0), strict=True):
        stats = shard.combine(logits.stats())
        rows_C: torch.Tensor | slice = chunk if rows_R is None else rows_R[chunk]
        logp_T[rows_C], entropy_T[rows_C] = stats.logp_C, stats.entropy_C
        if not any(wanted):
            continue
        # Rows of later chunks hold zeros here: what their gradient would be is not read.
        here = batch_of(logp_T)
        check_batch(objective.needs_reference, here.old_mode, here.ref_mode)
        dlogp_C = logp_gradient(objective, logp_T, here)[rows_C] * scale
        dentropy_C = here.mask_T[rows_C].to(dlogp_C.dtype) * (-entropy_bonus * scale) if entropy_bonus else None
        keep_K = None
        if skip_zero_rows:
            has_C = dlogp_C != 0 if dentropy_C is None else (dlogp_C != 0) | (dentropy_C != 0)
            keep_K = has_C.nonzero()[:, 0]
            if len(keep_K) == len(has_C):
                keep_K = None
        count = len(dlogp_C) if keep_K is None else len(keep_K)
        kept += count
        if count == 0:
            continue
        dlogits_KV = logits.dlogits(keep_K, stats, dlogp_C, dentropy_C)
        if dh_TH is not None:
            rows_K = rows_C if keep_K is None else _rows(rows_C, keep_K)
            dh_TH[rows_K] = backend.dgrad(dlogits_KV).to(h_TH.dtype)
        if sum_VH is not None:
            backend.add_wgrad(sum_VH[:valid], dlogits_KV, pick(h_RH[chunk], keep_K))
        del dlogits_KV
    if main_grad is not None and dweight_VH is not None:
        main_grad.add_(dweight_VH)  # a main_grad below float32: rounded once, not once a chunk
        dweight_VH = None

    final = batch_of(logp_T)
    out = objective(logp_T, final)
    loss_sum = out.loss_sum
    if entropy_bonus:
        loss_sum = loss_sum - entropy_bonus * entropy_T.masked_fill(~final.mask_T, 0).sum()
    rows = HeadRows(h_TH.shape[0], h_RH.shape[0], kept)
    return PolicyHeadOut(loss_sum, out.num_tokens, out.metrics, final, logp_T, entropy_T, rows), dh_TH, dweight_VH


def _rows(rows_C: torch.Tensor | slice, keep_K: torch.Tensor) -> torch.Tensor:
    return keep_K + rows_C.start if isinstance(rows_C, slice) else rows_C[keep_K]


@dataclass
class _Formed:
    """Gradients that wait for the backward."""

    dh_TH: torch.Tensor | None
    dweight_VH: torch.Tensor | None
    in_main_grad: bool
    upstream: float


class _Attach(torch.autograd.Function):
    """Hands gradients that exist already to autograd."""

    @staticmethod
    def forward(
        ctx: Any, h_TH: torch.Tensor, weight_VH: torch.Tensor, loss_sum: torch.Tensor, formed: _Formed
    ) -> torch.Tensor:
        ctx.formed, ctx.weight_VH = formed, weight_VH
        return loss_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        formed: _Formed = ctx.formed
        assert formed is not None, "the head's gradients were handed out already: one backward a forward"
        ctx.formed = None
        if not formed.in_main_grad:
            dh_TH = None if formed.dh_TH is None else formed.dh_TH.mul_(grad)
            dweight_VH = None if formed.dweight_VH is None else formed.dweight_VH.mul_(grad).to(ctx.weight_VH.dtype)
            return dh_TH, dweight_VH, None, None
        torch._assert_async(grad == formed.upstream, f"main_grad was formed for an upstream gradient {formed.upstream}")
        return formed.dh_TH, _added_to_main_grad(ctx.weight_VH), None, None


def _added_to_main_grad(weight_VH: torch.Tensor) -> torch.Tensor:
    """The gradient that stands for one added already, so that megatron's hook fires (overlap_grad_reduce waits for it).

    As in megatron's linear layers: the mark keeps the hook from adding it, unless the weight is an embedding too
    (`zero_out_wgrad`), where it is summed with the embedding's gradient and must be zeros.
    """
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight_VH, "zero_out_wgrad", False):
        return torch.zeros_like(weight_VH)
    return torch.empty_like(weight_VH)
