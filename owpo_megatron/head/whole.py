"""KL of the policy to a teacher over the whole vocabulary, chunk by chunk: both have logits of a chunk at a time.

Plain torch in float32 (float64) on every device, and exact. It costs 4 T V H beside the head's own passes, 2 for the
teacher's logits and 2 for the policy's again, and holds two matrices of a chunk's logits more.

Shapes: R rows that take part, C rows of a chunk, K kept rows of a chunk, H hidden, V columns on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from owpo_megatron.head.backend import wide
from owpo_megatron.head.shard import VocabShard


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's side of a microbatch.

    Args:
        h_RH: its final hidden states of the rows of `TokenBatch.row_mask_T`, in order, on every tensor-parallel rank.
        weight_VH: its output embedding, this rank's rows, padding included.
    """

    h_RH: torch.Tensor
    weight_VH: torch.Tensor


class WholeVocabulary:
    """Compares two heads of one shape at one temperature.

    Args:
        weight_VH: the policy's output embedding, this rank's rows.
    """

    def __init__(self, weight_VH: torch.Tensor, teacher: TeacherRows, inverse_temperature: float, shard: VocabShard):
        dtype = wide(weight_VH)
        self._weight_VH = weight_VH.detach()[: shard.valid_rows].to(dtype)
        self._teacher_VH = teacher.weight_VH.detach()[: shard.valid_rows].to(dtype)
        self._teacher_RH = teacher.h_RH.detach()
        self._inverse_temperature, self._shard = inverse_temperature, shard

    def chunk(self, rows: slice, h_RH: torch.Tensor) -> ChunkDivergence:
        """Compare these rows. Collective over the tensor-parallel ranks."""
        logp_CV = self._log_softmax(h_RH[rows], self._weight_VH)
        ratio_CV = logp_CV - self._log_softmax(self._teacher_RH[rows], self._teacher_VH)
        p_CV = logp_CV.exp_()
        kl_C = self._shard.sum((p_CV * ratio_CV).sum(dim=1))
        return ChunkDivergence(kl_C, p_CV, ratio_CV, self._inverse_temperature)

    def _log_softmax(self, h_CH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
        """[C, V] of this rank's columns, normalised over the columns of all ranks."""
        logits_CV = torch.mm(h_CH.to(weight_VH.dtype), weight_VH.t()).mul_(self._inverse_temperature)
        local_4C = logits_CV.new_zeros(4, len(logits_CV))
        local_4C[0] = torch.finfo(logits_CV.dtype).min  # of a rank that holds nothing but padding
        if logits_CV.shape[1]:
            local_4C[0] = logits_CV.amax(dim=1)
            local_4C[1] = (logits_CV - local_4C[0][:, None]).exp().sum(dim=1)
        return logits_CV.sub_(self._shard.combine(local_4C).lse_C[:, None])


@dataclass(frozen=True)
class ChunkDivergence:
    """KL(policy || teacher) of a chunk's rows, and what its gradient needs."""

    kl_C: torch.Tensor  # over the whole vocabulary, the same on every rank
    p_CV: torch.Tensor
    ratio_CV: torch.Tensor  # log p - log q
    inverse_temperature: float

    def dlogits(self, keep_K: torch.Tensor | None, dkl_C: torch.Tensor) -> torch.Tensor:
        """Gradient of sum(dkl * kl) in the GEMM's result [K, V]: d kl / d z_j = p_j (log p_j - log q_j - kl)."""
        dkl_K, kl_K, p_KV, ratio_KV = (
            value if keep_K is None else value[keep_K] for value in (dkl_C, self.kl_C, self.p_CV, self.ratio_CV)
        )
        return (ratio_KV - kl_K[:, None]) * p_KV * (dkl_K * self.inverse_temperature)[:, None]
