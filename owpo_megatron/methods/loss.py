"""Turn a method's value per token into the loss: masks, the correction for the engine, divisor, sums.

Losses are sums with a count: the division happens once, after the last microbatch of the last rank.

Shapes: T packed tokens of a microbatch, C rows of a chunk, S samples of a microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from owpo_megatron.methods.method import ChunkBatch, Divisor, Method, Terms
from owpo_megatron.types import TokenBatch

if TYPE_CHECKING:
    import torch


RESERVED = frozenset(
    {"value", "entropy", "entropy_bonus", "kl_value", "kl_whole_sum", "tokens", "tis_sum", "tis_capped"}
)
"""Names of the trainer's own sums, which no metric of a method may have."""


@dataclass(frozen=True)
class Loss:
    """Sums over a microbatch."""

    loss_sum: torch.Tensor  # scalar, to be minimised
    count: torch.Tensor  # scalar int: what the sum over the whole minibatch is divided by
    metrics: dict[str, torch.Tensor]  # float64, scalar or [K]


class Chunk(NamedTuple):
    """Contribution of one chunk to the loss, and its gradient."""

    dlogp_C: torch.Tensor  # d loss_sum / d logp; exactly 0 where a token has no gradient
    dentropy_C: torch.Tensor | None  # d loss_sum / d entropy; None without an entropy bonus
    dkl_C: torch.Tensor | None = None  # d loss_sum / d KL over the whole vocabulary; None for methods without


@dataclass(frozen=True)
class Division:
    """Reduction of a microbatch's values to its sum.

    Args:
        length_T: what a token's value is divided by before the sum; None: 1. An elementwise division by an integer
            count, so that no float is ever scattered: the same inputs give the same bits on a GPU too.
        count: see Loss.
    """

    length_T: torch.Tensor | None
    count: torch.Tensor

    @classmethod
    def of(cls, divisor: Divisor, batch: TokenBatch) -> Division:
        """`sample_T` may hold anything where `mask_T` is False; a microbatch may have no sample at all."""
        import torch

        mask_T = batch.mask_T
        if divisor == "tokens":
            return cls(None, mask_T.sum())
        sample_T = batch.sample_T.masked_fill(~mask_T, 0)
        count_S = torch.zeros(max(batch.num_samples, 1), dtype=torch.int64, device=mask_T.device)
        if batch.count_S is None:
            count_S = count_S.index_add(0, sample_T, mask_T.to(torch.int64))
        elif batch.num_samples:
            count_S = batch.count_S.to(mask_T.device)
        length_T = count_S[sample_T].clamp(min=1) if divisor == "samples" else None
        count = (count_S > 0).sum()
        return cls(length_T, count if batch.counts_samples else torch.zeros_like(count))


class MethodLoss:
    """The loss of one microbatch, chunk after chunk: `add` each, then `total`.

    A method is evaluated once per row. Values and metrics are kept per token and summed over the whole [T] vector at
    the end, so that the sums have the same bits for every size of chunk.
    """

    def __init__(self, method: Method, batch: TokenBatch):
        self._method = method
        self._batch = batch
        self._division = Division.of(method.chosen_divisor, batch)
        self._columns: dict[str, torch.Tensor] = {}

    def add(
        self, rows_C: torch.Tensor | slice, logp_C: torch.Tensor, entropy_C: torch.Tensor, gradient: bool = True,
        kl_C: torch.Tensor | None = None, statistic_C: torch.Tensor | None = None,
    ) -> Chunk | None:  # fmt: skip
        """Evaluate the method on these rows; returns the gradient where it is wanted.

        Args:
            kl_C: KL(policy || teacher) over the whole vocabulary, for methods with `whole_vocabulary`.
            statistic_C: the current policy's, for methods with a `statistic` and coupling `token`.
        """
        import torch

        entropy_or_none_C = entropy_C if self._method.needs_entropy else None
        batch = chunk_batch(self._batch, rows_C, logp_C, entropy_or_none_C, statistic_C)
        leaf_C = logp_C.detach()
        with torch.set_grad_enabled(gradient):
            if gradient:
                leaf_C = leaf_C.requires_grad_()
            # A microbatch without a sample that counts has nothing prepared, and no row that is read.
            idle = self._method.coupling != "token" and not batch.given
            terms = Terms(leaf_C * 0) if idle else self._method.terms(leaf_C, batch)
        factor_C = self._keep(rows_C, terms, batch, logp_C, entropy_C, kl_C)
        if not gradient:
            return None
        mask_C = self._batch.mask_T[rows_C]
        upstream_C = self._divided(-mask_C.to(terms.value_C.dtype), rows_C)
        dentropy_C = upstream_C * self._method.entropy_coef if self._method.entropy_coef else None
        if terms.entropy_coef_C is not None:
            of_tokens_C = upstream_C * terms.entropy_coef_C.detach()
            dentropy_C = of_tokens_C if dentropy_C is None else dentropy_C + of_tokens_C
        dkl_C = None if terms.kl_coef_C is None else upstream_C * terms.kl_coef_C.detach()
        if factor_C is not None:
            upstream_C = upstream_C * factor_C
        if not terms.value_C.requires_grad:
            return Chunk(torch.zeros_like(logp_C), dentropy_C, dkl_C)
        (dlogp_C,) = torch.autograd.grad(terms.value_C, leaf_C, upstream_C)
        return Chunk(dlogp_C.masked_fill(~mask_C, 0), dentropy_C, dkl_C)

    def total(self) -> Loss:
        """The sums over all chunks that were added."""
        batch, columns = self._batch, dict(self._columns)
        loss_sum = batch.advantage_T.new_zeros(())
        if "value" in columns:
            value_T, factor_T = columns.pop("value"), columns.get("tis_sum")
            if factor_T is not None:
                value_T = value_T * factor_T
            loss_sum = -self._summed(value_T)
        if "entropy" in columns:
            loss_sum = loss_sum - self._method.entropy_coef * self._summed(columns.pop("entropy"))
        for name in ("entropy_bonus", "kl_value"):
            if name in columns:
                loss_sum = loss_sum - self._summed(columns.pop(name))
        return Loss(loss_sum, self._division.count, metric_sums(columns, batch.mask_T))

    def _keep(
        self, rows_C: torch.Tensor | slice, terms: Terms, batch: ChunkBatch, logp_C: torch.Tensor,
        entropy_C: torch.Tensor, kl_C: torch.Tensor | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Note what has to be summed; returns the factor of truncated importance sampling."""
        columns = {"value": terms.value_C.detach(), **terms.metrics}
        if self._method.entropy_coef:
            columns["entropy"] = entropy_C
        if terms.entropy_coef_C is not None:
            columns["entropy_bonus"] = terms.entropy_coef_C * entropy_C
        if terms.kl_coef_C is not None:
            assert kl_C is not None, "the method compares the whole vocabulary, and there is no teacher"
            columns |= {"kl_value": terms.kl_coef_C * kl_C, "kl_whole_sum": kl_C}
        factor_C = None
        if self._method.tis_cap is not None:
            factor_C, capped_C = truncated_importance(batch, self._method.tis_cap)
            columns |= {"tis_sum": factor_C, "tis_capped": capped_C}
        for name, value_C in columns.items():
            if name not in self._columns:
                rows = len(self._batch.mask_T)
                self._columns[name] = value_C.new_zeros((rows, *value_C.shape[1:]))
            self._columns[name][rows_C] = value_C.detach()
        return factor_C

    def _summed(self, value_T: torch.Tensor) -> torch.Tensor:
        length_T = self._division.length_T
        value_T = value_T if length_T is None else value_T / length_T
        return value_T.masked_fill(~self._batch.mask_T, 0).sum()

    def _divided(self, value_C: torch.Tensor, rows_C: torch.Tensor | slice) -> torch.Tensor:
        length_T = self._division.length_T
        return value_C if length_T is None else value_C / length_T[rows_C]


def dense_loss(
    method: Method,
    logp_T: torch.Tensor,
    batch: TokenBatch,
    entropy_T: torch.Tensor | None = None,
    kl_T: torch.Tensor | None = None,
    statistic_T: torch.Tensor | None = None,
) -> Loss:
    """The loss in one piece, differentiable in its tensors [T]: for tests and benchmarks, without a head."""
    everything = slice(None)
    given_T = entropy_T.detach() if entropy_T is not None and method.needs_entropy else None
    chunk = chunk_batch(batch, everything, logp_T.detach(), given_T, statistic_T)
    terms = method.terms(logp_T, chunk)
    division, value_T, columns = Division.of(method.chosen_divisor, batch), terms.value_C, dict(terms.metrics)
    if method.tis_cap is not None:
        factor_T, capped_T = truncated_importance(chunk, method.tis_cap)
        value_T, columns = value_T * factor_T, columns | {"tis_sum": factor_T, "tis_capped": capped_T}
    if method.entropy_coef:
        assert entropy_T is not None, "an entropy bonus needs the entropies"
        value_T = value_T + method.entropy_coef * entropy_T
    if terms.entropy_coef_C is not None:
        assert entropy_T is not None, "an entropy bonus needs the entropies"
        value_T = value_T + terms.entropy_coef_C.detach() * entropy_T
    if terms.kl_coef_C is not None:
        assert kl_T is not None, "the method compares the whole vocabulary"
        value_T, columns = value_T + terms.kl_coef_C.detach() * kl_T, columns | {"kl_whole_sum": kl_T}
    if division.length_T is not None:
        value_T = value_T / division.length_T
    loss_sum = -value_T.masked_fill(~batch.mask_T, 0).sum()
    return Loss(loss_sum, division.count, metric_sums(columns, batch.mask_T))


def chunk_batch(
    batch: TokenBatch, rows_C: torch.Tensor | slice, logp_C: torch.Tensor, entropy_C: torch.Tensor | None = None,
    statistic_C: torch.Tensor | None = None,
) -> ChunkBatch:  # fmt: skip
    """The rows of a microbatch that a method may see at a time.

    Where a pass was not spent its values are the current policy's own: the old policy of a single update, and a
    reference that has the old policy's weights.
    """
    old_C = logp_C.detach() if batch.old_logp_T is None else batch.old_logp_T[rows_C]
    ref_C = batch.ref_logp_T[rows_C]
    if batch.ref_is_old_T is not None:
        ref_C = old_C.where(batch.ref_is_old_T[rows_C], ref_C)
    return ChunkBatch(
        old_logp_C=old_C,
        ref_logp_C=ref_C,
        advantage_C=batch.advantage_T[rows_C],
        active_C=batch.active_T[rows_C],
        behaviour_logp_C=None if batch.behaviour_logp_T is None else batch.behaviour_logp_T[rows_C],
        entropy_C=entropy_C,
        statistic_C=statistic_C,
        old_statistic_C=statistic_C if batch.old_statistic_T is None else batch.old_statistic_T[rows_C],
        given={name: value_T[rows_C] for name, value_T in (batch.given or {}).items()},
        external_C=None if batch.external_T is None else batch.external_T[rows_C],
        off_policy_C=None if batch.off_policy_T is None else batch.off_policy_T[rows_C],
    )


def truncated_importance(batch: ChunkBatch, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(min(r, cap), r > cap) per token with r = exp(old_logp - behaviour_logp), detached.

    Engine and trainer compute the same weights' probabilities with other kernels, sometimes in another precision. The
    factor corrects the expectation for that; the cap bounds its variance. Ratio and clip of the method stay between the
    current and the old policy of the trainer. With an engine that agrees it is 1 and changes nothing. Penalties (k3)
    are scaled too: they are means over the same samples.

    Source: Ionides 2008 (truncated weights); Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training" (the engine mismatch).
    """
    assert batch.behaviour_logp_C is not None, "the engine's log-probs are needed"
    ratio_C = (batch.old_logp_C.detach() - batch.behaviour_logp_C).exp()
    if batch.external_C is not None:
        ratio_C = ratio_C.masked_fill(batch.external_C, 1)  # no engine sampled these
    return ratio_C.clamp(max=cap), ratio_C > cap


def metric_sums(columns: Mapping[str, torch.Tensor], mask_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float64 sums over response tokens, and their number as `tokens`."""
    sums = {"tokens": mask_T.sum().double()}
    for name, value_T in columns.items():
        where_T = mask_T if value_T.dim() == 1 else mask_T[:, None]
        sums[name] = value_T.detach().double().masked_fill(~where_T, 0).sum(dim=0)
    return sums
