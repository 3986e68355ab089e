"""The LM head of one pass: log-probs, or the loss with the gradients of h and W, without the logits of all tokens.

In a training pass d loss / d logp is known as soon as a chunk's log-probs are, while the chunk's logits still exist: no
logit is computed twice (6 T V H instead of 8), and rows without gradient leave before the two backward GEMMs.
Shapes: T rows (tokens), R rows that take part, C rows of a chunk, K rows with gradient, H hidden, V rows of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from owpo_megatron.head.backend import Backend, BackendName, exact_backend, fp8_backend, wide
from owpo_megatron.head.fp8 import Fp8Weight
from owpo_megatron.head.gradients import FormedGradients, attach
from owpo_megatron.head.logprobs import ExactLogProbs, LogProbs, RawLogProbs, RefinedLogProbs, check_batch
from owpo_megatron.head.rows import Rows, chosen, may_have_gradient
from owpo_megatron.head.shard import VocabShard
from owpo_megatron.head.statistic import statistic_of
from owpo_megatron.head.whole import TeacherRows, WholeVocabulary
from owpo_megatron.methods.loss import MethodLoss
from owpo_megatron.methods.method import Method
from owpo_megatron.methods.prepare import prepared_in_microbatch
from owpo_megatron.methods.statistic import Statistic
from owpo_megatron.types import LogpMode, TokenBatch

_TYPE: dict[LogpMode, type[LogProbs]] = {"exact": ExactLogProbs, "fp8_refined": RefinedLogProbs, "fp8_raw": RawLogProbs}


@dataclass(frozen=True)
class HeadRows:
    """Counts of rows by path."""

    total: int
    forward: int  # of the row mask
    gradient: int  # that went through the backward products, of these


@dataclass(frozen=True)
class HeadLoss:
    """Result of `Head.loss`. Everything but `loss_sum` is detached."""

    loss_sum: torch.Tensor  # differentiable in h and the weight
    count: torch.Tensor  # what the sum over the whole minibatch is divided by
    metrics: dict[str, torch.Tensor]
    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    rows: HeadRows


class Head:
    """softmax(h W^T / temperature). Build one per pass: its weight is converted and quantised at most once.

    Every call names its mode. `exact`: products of the inputs' dtype, summed in float32. `fp8_refined`: FP8 over the
    whole vocabulary, then the target and the best columns of each row again exactly; the softmax, the loss and the
    gradient of the logits are formed from these logits, and the two backward products are those of `exact`.

    Args:
        weight_VH: this rank's rows of the output embedding, padding included.
        temperature: divides the logits, for log-probs and entropies alike.
        shard: this rank's place in the vocabulary; None: the weight is whole and has no padding.
        backend: "torch" or "triton" instead of what suits the device.
        chunk_rows: rows whose logits exist at the same time; None: what suits the device.
        plans_rows: choose the rows of the backward products before the first chunk, so that the host reads nothing of
            the device per chunk; clipped rows then stay among them, as zeros. None: on a GPU.
    """

    def __init__(
        self,
        weight_VH: torch.Tensor,
        temperature: float = 1.0,
        shard: VocabShard | None = None,
        backend: BackendName = "auto",
        chunk_rows: int | None = None,
        plans_rows: bool | None = None,
    ):
        self.weight_VH = weight_VH
        self.shard = shard or VocabShard(weight_VH.shape[0])
        self._valid_VH = weight_VH.detach()[: self.shard.valid_rows]
        self._inverse_temperature = 1.0 / temperature
        self._backend_name = backend
        self._chunk_rows = chunk_rows
        self._plans_rows = weight_VH.is_cuda if plans_rows is None else plans_rows
        self._backends: dict[LogpMode, Backend] = {}
        self._fp8_weight: Fp8Weight | None = None

    @torch.no_grad()
    def logprobs(
        self,
        h_TH: torch.Tensor,
        target_T: torch.Tensor,
        row_mask_T: torch.Tensor | None = None,
        mode: LogpMode = "exact",
        statistic: Statistic | None = None,
    ) -> LogProbs:
        """Log-prob of `target_T`, entropy and log-sum-exp, without gradients: 2 T V H.

        Args:
            h_TH: final hidden states, the same on every tensor-parallel rank.
            target_T: int64 global token ids; read only where `row_mask_T`.
            row_mask_T: bool; other rows are skipped and are zero in the result. The same on every rank.
            mode: "exact", "fp8_refined" or "fp8_raw"; it determines the type of the result.
            statistic: a further statistic of the vocabulary per token, `statistic_T` of the result; it costs two more
                collectives per chunk and a pass over the chunk's logits.

        Returns:
            float32 results, or float64 for float64 inputs: the same on every rank of the group, and the same bits as
            `loss` gives for the same rows, chunks and mode. One collective, of four floats per row and rank.
        """
        backend = self._backend(mode)
        rows = self._rows(backend, h_TH, target_T, row_mask_T)
        local_4R = torch.empty(4, len(rows.h_RH), dtype=wide(h_TH), device=h_TH.device)
        own_R = torch.zeros_like(local_4R[0])
        all_logits = backend.chunks(rows.h_RH, rows.column_R, rows.slices, statistic is not None)
        for chunk, logits in zip(rows.slices, all_logits, strict=True):
            local_4R[:, chunk] = logits.stats()
            if statistic is not None:
                stats = self.shard.combine(local_4R[:, chunk].contiguous())
                own_R[chunk] = statistic_of(statistic, logits, stats, self.shard)
        stats = self.shard.combine(local_4R)
        logp_T, entropy_T, lse_T = (rows.spread(one) for one in (stats.logp_C, stats.entropy_C, stats.lse_C))
        return _TYPE[mode](logp_T, entropy_T, lse_T, None if statistic is None else rows.spread(own_R))

    def loss(
        self,
        h_TH: torch.Tensor,
        target_T: torch.Tensor,
        batch: TokenBatch,
        method: Method,
        mode: LogpMode = "exact",
        teacher: TeacherRows | None = None,
    ) -> HeadLoss:
        """The method's loss, with the gradients of h and the weight formed on the way: 6 T V H, or less.

        Rows whose gradient is exactly zero (advantage 0, clipped, masked) skip the backward GEMMs. The weight's
        gradient is added to `weight_VH.main_grad` where it exists (megatron's buffer), during this call; the backward
        then only reports it as added, as megatron's own linear layers do.

        Args:
            h_TH, target_T: as for `logprobs`, on the rows of `batch.row_mask_T`.
            batch: its values must be the same on every tensor-parallel rank: they decide which rows leave.
            method: with coupling `sample` its `prepare` runs here, after a first pass over the same hidden states.
            mode: "exact" or "fp8_refined", the mode of the batch's log-probs.
            teacher: for methods with `whole_vocabulary`, and for no other.

        Raises:
            TypeError: a ratio would be formed of log-probs of two modes, or of raw FP8; a method whose coupling is
                `group` or `minibatch` was not prepared; or a whole-vocabulary method has no teacher.

        The gradient of h is this rank's PARTIAL sum (over its part of the vocabulary): the caller reduces it, as
        megatron's copy-to / gather-from regions in front of the output layer do. The weight's is complete.
        """
        check_batch(batch, method.needs_reference, mode)
        batch = self._prepared(h_TH, target_T, batch, method, mode)
        formed = FormedGradients(h_TH, self.weight_VH)
        whole = self._compared(method, teacher)
        with torch.no_grad():
            out = self._form(h_TH, target_T, batch, method, formed, self._backend(mode), whole)
        return replace(out, loss_sum=attach(h_TH, self.weight_VH, out.loss_sum, formed)) if formed.wanted else out

    @torch.no_grad()
    def slopes(
        self, h_CH: torch.Tensor, target_C: torch.Tensor, dlogp_C: torch.Tensor, mode: LogpMode
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs [C] of a few rows, and the gradients of sum(dlogp_C * logp_C): of the logits and of h. For checks.

        Returns:
            (logp_C, dlogits_CV of this rank's columns, dh_CH summed over the ranks).
        """
        backend = self._backend(mode)
        (logits,) = backend.chunks(h_CH, self.shard.column(target_C), [slice(0, len(h_CH))])
        stats = self.shard.combine(logits.stats())
        dlogits_CV = logits.dlogits(None, stats, dlogp_C, None)
        return stats.logp_C, dlogits_CV, self.shard.sum(backend.dgrad(dlogits_CV))

    # ------------------------------------------------------------------------------------------ inside
    def _form(
        self,
        h_TH: torch.Tensor,
        target_T: torch.Tensor,
        batch: TokenBatch,
        method: Method,
        formed: FormedGradients,
        backend: Backend,
        whole: WholeVocabulary | None,
    ) -> HeadLoss:
        live_T = may_have_gradient(method, batch) if self._plans_rows and formed.wanted else None
        rows = self._rows(backend, h_TH, target_T, batch.row_mask_T, live_T)
        logp_T = torch.zeros(h_TH.shape[0], dtype=wide(h_TH), device=h_TH.device)
        entropy_T = torch.zeros_like(logp_T)
        loss, kept = MethodLoss(method, batch), 0
        statistic = method.statistic if method.coupling == "token" else None  # others have it in `prepare`
        keeps_logits = method.has_entropy_bonus or statistic is not None
        all_logits = backend.chunks(rows.h_RH, rows.column_R, rows.slices, keeps_logits)
        for chunk, logits in zip(rows.slices, all_logits, strict=True):
            stats = self.shard.combine(logits.stats())
            rows_C = rows.places(chunk)
            logp_T[rows_C], entropy_T[rows_C] = stats.logp_C, stats.entropy_C
            far = whole.chunk(chunk, rows.h_RH) if whole else None
            own_C = None if statistic is None else statistic_of(statistic, logits, stats, self.shard)
            slope = loss.add(rows_C, stats.logp_C, stats.entropy_C, formed.wanted, far.kl_C if far else None, own_C)
            if slope is None:
                continue
            keep_K = rows.kept(chunk, slope)
            count = len(slope.dlogp_C) if keep_K is None else len(keep_K)
            kept += count
            if count == 0:
                continue
            dlogits_KV = logits.dlogits(keep_K, stats, slope.dlogp_C, slope.dentropy_C)
            if far is not None and slope.dkl_C is not None:
                dlogits_KV += far.dlogits(keep_K, slope.dkl_C)
            if formed.dh_TH is not None:
                formed.dh_TH[chosen(rows_C, keep_K)] = backend.dgrad(dlogits_KV).to(h_TH.dtype)
            if formed.sum_VH is not None:
                h_KH = rows.h_RH[chunk] if keep_K is None else rows.h_RH[chunk][keep_K]
                backend.add_wgrad(formed.sum_VH[: len(self._valid_VH)], dlogits_KV, h_KH)
            del dlogits_KV
        formed.finish()
        total = loss.total()
        counts = HeadRows(h_TH.shape[0], len(rows.h_RH), kept)
        return HeadLoss(total.loss_sum, total.count, total.metrics, logp_T, entropy_T, counts)

    def _prepared(
        self, h_TH: torch.Tensor, target_T: torch.Tensor, batch: TokenBatch, method: Method, mode: LogpMode
    ) -> TokenBatch:
        if method.coupling == "token" or batch.given is not None:
            return batch
        if method.coupling != "sample":
            what = f"{method.name} couples the tokens of a {method.coupling}"
            raise TypeError(f"{what}: the trainer calls its `prepare` before the update (methods/prepare.py)")
        now = self.logprobs(h_TH.detach(), target_T, batch.row_mask_T, mode, method.statistic)
        return prepared_in_microbatch(method, batch, now.logp_T, now.entropy_T, now.statistic_T)

    def _compared(self, method: Method, teacher: TeacherRows | None) -> WholeVocabulary | None:
        if method.whole_vocabulary != (teacher is not None):
            raise TypeError(f"{method.name}: a teacher's rows go with a method that compares the whole vocabulary")
        if teacher is None:
            return None
        return WholeVocabulary(self.weight_VH, teacher, self._inverse_temperature, self.shard)

    def _backend(self, mode: LogpMode) -> Backend:
        if mode not in self._backends:
            self._backends[mode] = self._made(mode)
        return self._backends[mode]

    def _made(self, mode: LogpMode) -> Backend:
        weight_VH, factor, name = self._valid_VH, self._inverse_temperature, self._backend_name
        if mode == "exact":
            return exact_backend(weight_VH, factor, name)
        if self._fp8_weight is None:
            self._fp8_weight = Fp8Weight(weight_VH)
        return fp8_backend(weight_VH, self._fp8_weight, factor, mode == "fp8_refined", name)

    def _rows(
        self,
        backend: Backend,
        h_TH: torch.Tensor,
        target_T: torch.Tensor,
        row_mask_T: torch.Tensor | None,
        live_T: torch.Tensor | None = None,
    ) -> Rows:
        size = self._chunk_rows or backend.chunk_rows(self.shard.local_rows)
        return Rows(h_TH, self.shard.column(target_T), row_mask_T, size, live_T)
