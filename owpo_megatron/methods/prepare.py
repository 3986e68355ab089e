"""Inputs of a coupled method's `terms`: complete samples for `prepare`, and its results for every token.

Shapes: L tokens of one response, T packed tokens of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from owpo_megatron.methods.loss import chunk_batch
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.types import LogpMode, Sample, TokenBatch

if TYPE_CHECKING:
    import torch

Given = Mapping[str, "float | torch.Tensor"]


def checked_prepare(method: Method, samples: Sequence[SampleView]) -> list[Given]:
    """`method.prepare`, with its result looked at.

    Raises:
        TypeError: not one mapping per sample, other names than the first one's, none at all, or a tensor that is not
            [L].
    """
    if not samples:
        return []
    given = list(method.prepare(samples))
    if len(given) != len(samples):
        raise TypeError(f"{method.name}.prepare returned {len(given)} mappings for {len(samples)} samples")
    names = set(given[0])
    for values, sample in zip(given, samples, strict=True):
        if set(values) != names or not names:
            raise TypeError(f"{method.name}.prepare must return the same names for every sample, at least one")
        for name, value in values.items():
            length = len(sample.now_logp_L)
            if not isinstance(value, (int, float)) and value.dim() != 0 and tuple(value.shape) != (length,):
                shape = tuple(value.shape)
                raise TypeError(f"{method.name}.prepare: {name} is {shape}; give a number, or one per token [{length}]")
    return given


def prepared_in_microbatch(
    method: Method, batch: TokenBatch, now_logp_T: torch.Tensor, entropy_T: torch.Tensor,
    statistic_T: torch.Tensor | None = None,
) -> TokenBatch:  # fmt: skip
    """The batch with `given` filled in by its own samples, for coupling `sample`: packing never splits a sample.

    Args:
        now_logp_T: the current policy's log-probs, detached.
        entropy_T: entropy of the current policy.
        statistic_T: the current policy's, for methods with a `statistic`.
    """
    views, rows = sample_views(method, batch, now_logp_T, entropy_T, statistic_T), _rows_of_samples(batch)
    given_T: dict[str, torch.Tensor] = {}
    for values, rows_L in zip(checked_prepare(method, list(views.values())), rows.values(), strict=True):
        for name, value in values.items():
            column_T = given_T.setdefault(name, now_logp_T.new_zeros(now_logp_T.shape))
            column_T[rows_L] = value if isinstance(value, (int, float)) else value.detach().to(column_T)
    return replace(batch, given=given_T)


def prepared_in_minibatch(
    method: Method,
    samples: Sequence[Sample],
    now: Sequence[torch.Tensor],
    entropies: Sequence[torch.Tensor] | None = None,
    now_mode: LogpMode = "exact",
    statistics: Sequence[torch.Tensor] | None = None,
) -> list[Sample]:
    """The samples with `given` filled in, for coupling `group` or `minibatch`. The same on every rank that calls it.

    Args:
        samples: all samples of a minibatch.
        now: the current policy's log-probs [L] of each.
        entropies: [L] each, for methods with `needs_entropy`.
        statistics: [L] each of the current policy, for methods with a `statistic`.
    """
    counted = [index for index, sample in enumerate(samples) if not sample.masked]
    views = [
        _view_of(
            method, samples[index], now[index], entropies[index] if entropies else None,
            statistics[index] if statistics else None,
        )
        for index in counted
    ]  # fmt: skip
    found = dict(zip(counted, checked_prepare(method, views), strict=True))
    nothing: Given = dict.fromkeys(next(iter(found.values()), {}), 0.0)  # of samples that do not count: never read
    return [
        replace(sample, given=_spread(sample, found.get(index, nothing)), now_mode=now_mode)
        for index, sample in enumerate(samples)
    ]


def sample_views(
    method: Method, batch: TokenBatch, now_logp_T: torch.Tensor, entropy_T: torch.Tensor,
    statistic_T: torch.Tensor | None = None,
) -> dict[int, SampleView]:  # fmt: skip
    """The samples of a microbatch that count, by their index."""
    assert (statistic_T is not None) == (method.statistic is not None), f"{method.name}: its statistic, and no other"
    chunk = chunk_batch(batch, slice(None), now_logp_T, statistic_C=statistic_T)
    found = {}
    for sample, rows_L in _rows_of_samples(batch).items():
        active = bool(chunk.active_C[rows_L].any())
        found[sample] = SampleView(
            now_logp_L=now_logp_T[rows_L],
            old_logp_L=chunk.old_logp_C[rows_L],
            ref_logp_L=chunk.ref_logp_C[rows_L] if _has_reference(method, active) else None,
            entropy_L=entropy_T[rows_L] if method.needs_entropy else None,
            advantage_L=chunk.advantage_C[rows_L],
            reward=0.0 if batch.reward_S is None else float(batch.reward_S[sample]),
            group=sample if batch.group_S is None else int(batch.group_S[sample]),
            active=active,
            now_statistic_L=None if chunk.statistic_C is None else chunk.statistic_C[rows_L],
            old_statistic_L=None if chunk.old_statistic_C is None else chunk.old_statistic_C[rows_L],
            external=chunk.external_C is not None and bool(chunk.external_C[rows_L].any()),
            off_policy=chunk.off_policy_C is not None and bool(chunk.off_policy_C[rows_L].any()),
        )
    return found


def _spread(sample: Sample, given: Given) -> Given:
    """The mapping that was prepared for the generated tokens, with a place for every token of the response."""
    if sample.loss_mask is None:
        return given
    return {
        name: value if isinstance(value, (int, float)) or not value.dim() else sample.spread(value)
        for name, value in given.items()
    }


def _view_of(
    method: Method, sample: Sample, now_L: torch.Tensor, entropy_L: torch.Tensor | None,
    statistic_L: torch.Tensor | None,
) -> SampleView:  # fmt: skip
    """The sample's generated tokens: a method never sees the others."""
    now_L = sample.in_loss(now_L)
    old_L = now_L if sample.old_logp is None else sample.in_loss(sample.old_logp)
    ref_L = old_L if sample.ref_is_old or sample.ref_logp is None else sample.in_loss(sample.ref_logp)
    advantage = sample.advantage
    if not isinstance(advantage, (int, float)) and advantage.dim():
        advantage = sample.in_loss(advantage)
    entropy_L = None if entropy_L is None else sample.in_loss(entropy_L)
    assert entropy_L is not None or not method.needs_entropy, f"{method.name} needs entropies"
    assert (statistic_L is not None) == (method.statistic is not None), f"{method.name}: its statistic, and no other"
    statistic_L = None if statistic_L is None else sample.in_loss(statistic_L)
    return SampleView(
        now_logp_L=now_L,
        old_logp_L=old_L,
        ref_logp_L=ref_L if _has_reference(method, sample.active) else None,
        entropy_L=entropy_L if method.needs_entropy else None,
        advantage_L=now_L.new_ones(now_L.shape) * advantage,
        reward=sample.reward,
        group=sample.group,
        active=sample.active,
        now_statistic_L=statistic_L,
        old_statistic_L=statistic_L if sample.old_statistic is None else sample.in_loss(sample.old_statistic),
        external=sample.origin == "expert",
        off_policy=sample.keeps_old,
    )


def _has_reference(method: Method, active: bool) -> bool:
    return method.needs_reference in ("all", "teacher") or (method.needs_reference == "active" and active)


def _rows_of_samples(batch: TokenBatch) -> dict[int, torch.Tensor]:
    """Rows of each sample that counts, in their order."""
    rows_R = batch.mask_T.nonzero()[:, 0]
    sample_R, order_R = batch.sample_T[rows_R].sort(stable=True)
    found, count = sample_R.unique_consecutive(return_counts=True)
    return dict(zip(found.tolist(), rows_R[order_R].split(count.tolist()), strict=True))


def slopes(
    samples: Sequence[SampleView], function: Callable[[list[torch.Tensor]], torch.Tensor]
) -> list[dict[str, float | torch.Tensor]]:
    """`prepare` of a method that is one function F of all log-probs; its `terms` are then `linear_terms`.

    The gradient of F in the weights is the sum over tokens of (dF / dlogp at the present log-probs) times the gradient
    of logp, which is what the terms give. Use it with the divisor `tokens` or `sample_sums`.

    Args:
        function: from the current log-probs of each sample ([L] each) to the scalar F, which is maximised: the sum
            that the divisor divides.
    """
    import torch

    with torch.enable_grad():
        leaves = [sample.now_logp_L.detach().requires_grad_() for sample in samples]
        total = function(leaves)
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    share = float(total.detach()) / sum(len(leaf_L) for leaf_L in leaves)
    return [
        {"slope": torch.zeros_like(leaf_L) if slope_L is None else slope_L, "share": share}
        for leaf_L, slope_L in zip(leaves, found, strict=True)
    ]


def linear_terms(logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
    """Terms whose sum is F and whose gradient is dF / dlogp, from what `slopes` prepared."""
    return Terms(batch.given["share"] + batch.given["slope"] * (logp_C - logp_C.detach()))
