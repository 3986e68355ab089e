"""Plain-torch reference of the LM head: any device, any dtype, vocabulary split over tensor-parallel ranks.

Rows go through in chunks, so at most [chunk, V] logits exist at a time. The forward keeps h, the weight and one
log-sum-exp a row; the backward recomputes the logits chunk by chunk. Logits are never rounded below float32: at
bfloat16 the rounding of a log-ratio is larger than the small log-ratios that the method weighs.

Shapes: T rows (tokens), R kept rows, C rows of a chunk, H hidden, V rows of the weight on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def vocab_parallel_logprob(
    h_TH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_rows: int = 1024,
    row_mask_T: torch.Tensor | None = None,
    skip_zero_rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `target_T` and entropy of softmax(h weight^T / temperature), differentiable in h and weight.

    Args:
        h_TH: final hidden states, the same on every rank of `group`.
        weight_VH: this rank's rows of the output embedding; rank r holds global rows r V .. (r + 1) V - 1.
        target_T: int64 global token ids; read only where `row_mask_T`.
        temperature: divides the logits, for log-probs and entropies alike.
        vocab_size: true size of the whole vocabulary; rows of the weight beyond it are padding and take no part.
            None: nothing is padded.
        group: tensor-parallel group; None: the weight is whole.
        chunk_rows: rows whose logits exist at the same time.
        row_mask_T: bool; other rows are skipped in both passes and get log-prob 0, entropy 0 and zero gradient. Must
            be the same on every rank of `group`. None: every row.
        skip_zero_rows: the backward also skips rows whose upstream gradient is exactly zero.

    Returns:
        (logp_T, entropy_T) in float32, or float64 for float64 inputs. The same on every rank of `group`, bit for bit.

    The gradient of h is this rank's PARTIAL sum (over its part of the vocabulary): the caller reduces it over `group`,
    as megatron's copy-to / gather-from regions in front of the output layer do. The gradient of the weight is complete.
    One collective runs in the forward (four floats a row and rank), none in the backward.
    """
    head = _Head(
        inverse_temperature=1.0 / temperature,
        group=group,
        chunk_rows=chunk_rows,
        vocab_size=vocab_size,
        local_rows=weight_VH.shape[0],
        skip_zero_rows=skip_zero_rows,
    )
    if torch.is_grad_enabled() and (h_TH.requires_grad or weight_VH.requires_grad):
        return _VocabParallelLogprob.apply(h_TH, weight_VH, target_T, row_mask_T, head)
    return head.scatter_rows(head.forward(h_TH, weight_VH, target_T, row_mask_T), h_TH.shape[0])


@dataclass(frozen=True)
class _RowStats:
    """What the forward knows of the kept rows; all [R], global over the group."""

    rows_R: torch.Tensor | None  # their indices; None: every row
    lse_R: torch.Tensor
    logp_R: torch.Tensor
    entropy_R: torch.Tensor


@dataclass(frozen=True)
class _Head:
    inverse_temperature: float
    group: dist.ProcessGroup | None
    chunk_rows: int
    vocab_size: int | None
    local_rows: int
    skip_zero_rows: bool

    @property
    def _ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def _offset(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group) * self.local_rows

    @property
    def _valid_rows(self) -> int:
        """Rows of this rank's weight that are not padding; padding stands at the end of the whole vocabulary."""
        if self.vocab_size is None:
            return self.local_rows
        assert self.vocab_size <= self.local_rows * self._ranks, (
            f"{self._ranks} ranks of {self.local_rows} rows cannot hold a vocabulary of {self.vocab_size}"
        )
        return min(max(self.vocab_size - self._offset, 0), self.local_rows)

    def chunks(self, count: int) -> list[slice]:
        return [slice(start, start + self.chunk_rows) for start in range(0, count, self.chunk_rows)]

    def logits(self, h_CH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        return _product(h_CH, weight_VH.t()).mul_(self.inverse_temperature)

    def forward(
        self, h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, row_mask_T: torch.Tensor | None
    ) -> _RowStats:
        rows_R = None if row_mask_T is None else row_mask_T.nonzero()[:, 0]
        h_RH = _pick(h_TH, rows_R)
        target_R = _pick(target_T, rows_R)
        weight_VH = _operand(weight_VH[: self._valid_rows])
        # max, sum e^(z - max), z of the target, sum (z - max) e^(z - max): of this rank's columns
        local_4R = torch.empty(4, h_RH.shape[0], dtype=_wide(h_TH), device=h_TH.device)
        for chunk in self.chunks(h_RH.shape[0]):
            logits_CV = self.logits(h_RH[chunk], weight_VH)
            local_4R[2, chunk] = self._at_target(logits_CV, target_R[chunk])
            local_4R[0, chunk] = _row_max(logits_CV)
            shifted_CV = logits_CV.sub_(local_4R[0, chunk, None])
            exp_CV = shifted_CV.exp()
            local_4R[1, chunk] = exp_CV.sum(dim=1)
            local_4R[3, chunk] = exp_CV.mul_(shifted_CV).sum(dim=1)
        part_K4R = self._gather(local_4R)
        max_KR, sum_KR, target_KR, moment_KR = part_K4R.unbind(dim=1)
        max_R = max_KR.amax(dim=0)
        shift_KR = max_KR - max_R
        scale_KR = shift_KR.exp()
        sum_R = (scale_KR * sum_KR).sum(dim=0)
        moment_R = (scale_KR * (moment_KR + shift_KR * sum_KR)).sum(dim=0)
        log_sum_R = sum_R.log()
        # (z_y - max) - log sum, not z_y - lse: keeps the digits of a log-prob near 0
        logp_R = (target_KR.sum(dim=0) - max_R) - log_sum_R
        return _RowStats(rows_R, max_R + log_sum_R, logp_R, log_sum_R - moment_R / sum_R)

    def scatter_rows(self, stats: _RowStats, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(logp_T, entropy_T), zeros in the rows that were left out."""
        if stats.rows_R is None:
            return stats.logp_R, stats.entropy_R
        logp_T = stats.logp_R.new_zeros(count).index_copy(0, stats.rows_R, stats.logp_R)
        return logp_T, stats.logp_R.new_zeros(count).index_copy(0, stats.rows_R, stats.entropy_R)

    def backward(
        self,
        h_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_R: torch.Tensor,
        lse_R: torch.Tensor,
        entropy_R: torch.Tensor,
        upstream: tuple[torch.Tensor | None, torch.Tensor | None],
        wanted: tuple[bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(dh_RH partial, dweight_VH), or None where not wanted; upstream gradients of (logp, entropy) are [R]."""
        dlogp_R, dentropy_R = upstream
        want_h, want_weight = wanted
        valid = self._valid_rows
        operand_VH = _operand(weight_VH[:valid])
        dh_RH = torch.zeros_like(h_RH) if want_h else None
        dweight_VH = torch.zeros(weight_VH.shape, dtype=_wide(h_RH), device=h_RH.device) if want_weight else None
        for chunk in self.chunks(h_RH.shape[0]):
            logp_CV = self.logits(h_RH[chunk], operand_VH).sub_(lse_R[chunk, None])
            # d logp_y / d z_j = 1[j = y] - p_j        d entropy / d z_j = -p_j (log p_j + entropy)
            if dentropy_R is None:
                dlogits_CV = logp_CV.exp_().neg_()
            else:
                prob_CV = logp_CV.exp()
                dlogits_CV = logp_CV.add_(entropy_R[chunk, None]).mul_(prob_CV).mul_(-dentropy_R[chunk, None])
                dlogits_CV = dlogits_CV if dlogp_R is None else dlogits_CV.addcmul_(prob_CV, -dlogp_R[chunk, None])
            if dlogp_R is not None:
                if dentropy_R is None:
                    dlogits_CV.mul_(dlogp_R[chunk, None])
                self._add_at_target(dlogits_CV, target_R[chunk], dlogp_R[chunk])
            # float32 on a CPU; the GEMM operand's dtype on a GPU, as the forward's operands
            dlogits_CV = dlogits_CV.mul_(self.inverse_temperature).to(operand_VH.dtype)
            if dh_RH is not None:
                dh_RH[chunk] = _product(dlogits_CV, operand_VH).to(h_RH.dtype)
            if dweight_VH is not None:
                dweight_VH[:valid] += _product(dlogits_CV.t(), h_RH[chunk])
        return dh_RH, None if dweight_VH is None else dweight_VH.to(weight_VH.dtype)

    def _gather(self, local_4R: torch.Tensor) -> torch.Tensor:
        """[K, 4, R] of the K ranks. Every rank then does the same arithmetic, hence gets the same bits."""
        if self.group is None:
            return local_4R[None]
        part_K4R = local_4R.new_empty(self._ranks, *local_4R.shape)
        dist.all_gather(list(part_K4R.unbind(0)), local_4R, group=self.group)
        return part_K4R

    def _local_target(self, target_C: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(column of the target within this rank, whether it is here)."""
        column_C = target_C - self._offset
        return column_C.clamp(0, width - 1), (column_C >= 0) & (column_C < width)

    def _at_target(self, logits_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
        """Logit of the target where this rank has it, 0 elsewhere."""
        width = logits_CV.shape[1]
        if width == 0:
            return logits_CV.new_zeros(logits_CV.shape[0])
        column_C, here_C = self._local_target(target_C, width)
        return logits_CV.gather(1, column_C[:, None])[:, 0].masked_fill(~here_C, 0)

    def _add_at_target(self, dlogits_CV: torch.Tensor, target_C: torch.Tensor, value_C: torch.Tensor) -> None:
        if dlogits_CV.shape[1]:
            column_C, here_C = self._local_target(target_C, dlogits_CV.shape[1])
            dlogits_CV.scatter_add_(1, column_C[:, None], value_C.masked_fill(~here_C, 0)[:, None])


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_T: torch.Tensor,
        row_mask_T: torch.Tensor | None,
        head: _Head,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stats = head.forward(h_TH, weight_VH, target_T, row_mask_T)
        ctx.save_for_backward(h_TH, weight_VH, target_T, stats.rows_R, stats.lse_R, stats.entropy_R)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return head.scatter_rows(stats, h_TH.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        h_TH, weight_VH, target_T, rows_R, lse_R, entropy_R = ctx.saved_tensors
        head: _Head = ctx.head
        grads = [None if grad_T is None else _pick(grad_T, rows_R) for grad_T in upstream]
        if head.skip_zero_rows:
            keep = torch.stack([grad_R != 0 for grad_R in grads if grad_R is not None]).any(dim=0).nonzero()[:, 0]
            rows_R = keep if rows_R is None else rows_R[keep]
            lse_R, entropy_R = lse_R[keep], entropy_R[keep]
            grads = [None if grad_R is None else grad_R[keep] for grad_R in grads]
        dh_RH, dweight_VH = head.backward(
            _pick(h_TH, rows_R),
            weight_VH,
            _pick(target_T, rows_R),
            lse_R,
            entropy_R,
            (grads[0], grads[1]),
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1]),
        )
        if dh_RH is not None and rows_R is not None:
            dh_RH = torch.zeros_like(h_TH).index_copy_(0, rows_R, dh_RH)
        return dh_RH, dweight_VH, None, None, None


def _pick(value_T: torch.Tensor, rows_R: torch.Tensor | None) -> torch.Tensor:
    return value_T if rows_R is None else value_T[rows_R]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _operand(weight_VH: torch.Tensor) -> torch.Tensor:
    """The weight as a GEMM operand: a CPU has no GEMM of low-precision inputs with a float32 result."""
    return weight_VH if weight_VH.is_cuda else weight_VH.to(_wide(weight_VH))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in float32 (float64) arithmetic, with a result that is not rounded to the inputs' dtype."""
    if a.is_cuda and _wide(a) != a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(_wide(a)), b.to(_wide(b)))


def _row_max(logits_CV: torch.Tensor) -> torch.Tensor:
    """[C]; the most negative number for a rank whose columns are all padding (-inf would make 0 * inf below)."""
    if logits_CV.shape[1] == 0:
        return logits_CV.new_full((logits_CV.shape[0],), torch.finfo(logits_CV.dtype).min)
    return logits_CV.amax(dim=1)
