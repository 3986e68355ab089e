"""Whether a method keeps to its declared coupling: asked of the method itself, in milliseconds, before a run.

The head calls `terms` chunk by chunk; with coupling `sample`, `prepare` is called on the samples of one microbatch. A
method that reduces over more than it declares would get a wrong gradient without an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from owpo_megatron.errors import UserError
from owpo_megatron.methods.loss import RESERVED, chunk_batch
from owpo_megatron.methods.method import Method, SampleView, Terms
from owpo_megatron.methods.prepare import Given, checked_prepare, prepared_in_microbatch, sample_views
from owpo_megatron.types import TokenBatch

if TYPE_CHECKING:
    import torch

_LENGTHS = (3, 1, 4, 2, 5, 2)  # of six samples in three groups of two


def check_coupling(method: Method) -> None:
    """Evaluate random rows one by one, all at once and in another order, and compare.

    Raises:
        UserError: values, gradients or metrics of a row depend on other rows; `prepare` couples more samples than the
            method declares; or a shape is not per row.
    """
    batch, now = _random_batch()
    if method.statistic is None:
        now = now._replace(statistic_T=None)
    if method.coupling != "token":
        _check_prepare(method, list(sample_views(method, batch, *now).values()))
        batch = prepared_in_microbatch(method, batch, *now)
    _check_terms(method, batch, now)


class _Now(NamedTuple):
    """The values that the head has of each row."""

    logp_T: torch.Tensor
    entropy_T: torch.Tensor
    statistic_T: torch.Tensor | None


def _check_terms(method: Method, batch: TokenBatch, now: _Now) -> None:
    import torch

    rows = len(now.logp_T)
    whole = _evaluated(method, batch, torch.arange(rows), now)
    shuffled_T = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    parts = [shuffled_T, *torch.arange(rows).split(1)]
    for rows_C in parts:
        part = _evaluated(method, batch, rows_C, now)
        for name, value_C in part.items():
            if name not in whole or not torch.allclose(
                value_C, whole[name][rows_C], rtol=1e-9, atol=1e-12, equal_nan=True
            ):
                remedy = (
                    f"the {name} of a token depends on which other tokens terms() is called with (a mean(), sum() or "
                    "sort over rows?), and it is called chunk by chunk. Move that into prepare() and declare "
                    "`coupling` sample, group or minibatch (docs/methods.md)"
                )
                raise UserError("method", method.name, remedy)


def _evaluated(method: Method, batch: TokenBatch, rows_C: torch.Tensor, now: _Now) -> dict[str, torch.Tensor]:
    """Value, gradient and metrics of these rows, in float64."""
    import torch

    leaf_C = now.logp_T[rows_C].requires_grad_()
    entropy_C = now.entropy_T[rows_C] if method.needs_entropy else None
    statistic_C = None if now.statistic_T is None else now.statistic_T[rows_C]
    terms: Terms = method.terms(leaf_C, chunk_batch(batch, rows_C, leaf_C, entropy_C, statistic_C))
    found = {"value": terms.value_C, **{f"metric {name}": value for name, value in terms.metrics.items()}}
    if (terms.entropy_coef_C is not None) != method.entropy_bonus:
        raise UserError("method", method.name, "an entropy_coef_C of terms() and `entropy_bonus = True` go together")
    if taken := sorted(RESERVED & set(terms.metrics)):
        raise UserError("method", method.name, f"rename the metric {taken[0]}: the trainer uses this name")
    if (terms.kl_coef_C is not None) != method.whole_vocabulary:
        raise UserError("method", method.name, "a kl_coef_C of terms() and `whole_vocabulary` go together")
    if terms.entropy_coef_C is not None:
        found["entropy_coef"] = terms.entropy_coef_C
    if terms.kl_coef_C is not None:
        found["kl_coef"] = terms.kl_coef_C
    for name, value_C in found.items():
        if value_C.dim() == 0 or len(value_C) != len(rows_C):
            shape = tuple(value_C.shape)
            remedy = f"terms() returned a {name} of shape {shape} for {len(rows_C)} rows; give one per row"
            raise UserError("method", method.name, remedy)
    gradient_C = torch.zeros_like(leaf_C)
    if terms.value_C.requires_grad:
        # weights that differ, so that a coupling cannot cancel in the sum
        weight_C = (1 + rows_C).to(terms.value_C.dtype)
        (gradient_C,) = torch.autograd.grad(terms.value_C, leaf_C, weight_C)
        gradient_C = gradient_C / weight_C
    return {name: value.detach().double() for name, value in found.items()} | {"gradient": gradient_C}


def _check_prepare(method: Method, views: Sequence[SampleView]) -> None:
    """Check that the result is the same with only as many samples as the declared coupling needs."""
    together = checked_prepare(method, views)
    if method.coupling == "minibatch":
        return
    key = {"sample": lambda index: index, "group": lambda index: views[index].group}[method.coupling]
    for own in sorted({key(index) for index in range(len(views))}):
        indices = [index for index in range(len(views)) if key(index) == own]
        alone = checked_prepare(method, [views[index] for index in indices])
        for index, values in zip(indices, alone, strict=True):
            if not _same(values, together[index]):
                wider = "group or minibatch" if method.coupling == "sample" else "minibatch"
                remedy = f"prepare() couples more than one {method.coupling}; declare `coupling` {wider}"
                raise UserError("method", method.name, remedy)


def _same(one: Given, other: Given) -> bool:
    import torch

    return all(_close(torch.as_tensor(one[name]).double(), torch.as_tensor(other[name]).double()) for name in one)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.allclose(other, rtol=1e-9, atol=1e-12, equal_nan=True)


def _random_batch() -> tuple[TokenBatch, _Now]:
    """Inputs in float64: both signs of A, active and inactive samples, ratios on both sides."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(_LENGTHS)
    sample_T = torch.arange(len(_LENGTHS)).repeat_interleave(lengths)

    def noise(count: int = len(sample_T)) -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    logp_T = -noise().abs() - 0.05
    every_T = torch.ones_like(sample_T, dtype=torch.bool)
    reward_S = torch.tensor([1.0, 0.0] * (len(_LENGTHS) // 2))
    batch = TokenBatch(
        old_logp_T=logp_T + 0.3 * noise(),
        ref_logp_T=logp_T + 0.3 * noise(),
        advantage_T=((2 * reward_S - 1) * (1 + noise(len(_LENGTHS)).abs()))[sample_T],
        active_T=(torch.arange(len(_LENGTHS)) % 3 != 2)[sample_T],
        mask_T=every_T,
        sample_T=sample_T,
        num_samples=len(_LENGTHS),
        behaviour_logp_T=logp_T + 0.3 * noise(),
        reward_S=reward_S,
        group_S=torch.arange(len(_LENGTHS)) // 2,
    )
    entropy_T = noise().abs()
    batch = replace(batch, old_statistic_T=logp_T + noise())
    return batch, _Now(logp_T, entropy_T, logp_T + noise())
