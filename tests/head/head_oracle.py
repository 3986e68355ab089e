"""The dense oracle of the head: log_softmax and autograd over everything, and inputs to compare on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from owpo_megatron.head import Head, VocabShard
from owpo_megatron.methods import Method, dense_loss
from owpo_megatron.methods.statistic import Statistic
from owpo_megatron.types import TokenBatch


def make_inputs(
    rows: int = 23, hidden: int = 8, vocab: int = 37, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h, weight, target)."""
    generator = torch.Generator().manual_seed(seed)
    h_TH = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight_VH = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
    return h_TH, weight_VH, torch.randint(0, vocab, (rows,), generator=generator)


def make_batch(logp_T: torch.Tensor, mask_T: torch.Tensor | None = None, seed: int = 1) -> TokenBatch:
    """Samples of unequal lengths; advantages of both signs and some zeros; ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(logp_T)

    def noise() -> torch.Tensor:
        return torch.randn(rows, generator=generator, dtype=torch.float64)

    sample_T = (torch.arange(rows) ** 2 // (3 * rows)).clamp(max=5)
    advantage_T = noise() * (torch.rand(rows, generator=generator) > 0.25)
    return TokenBatch(
        old_logp_T=logp_T.detach().double() + 0.15 * noise(),
        ref_logp_T=logp_T.detach().double() + 0.3 * noise(),
        advantage_T=advantage_T,
        active_T=torch.rand(rows, generator=generator) < 0.6,
        mask_T=torch.rand(rows, generator=generator) < 0.85 if mask_T is None else mask_T,
        sample_T=sample_T,
        num_samples=6,
    )


def make_head(
    weight_VH: torch.Tensor, vocab_size: int | None = None, group: dist.ProcessGroup | None = None, **options: Any
) -> Head:
    return Head(weight_VH, shard=VocabShard(len(weight_VH), vocab_size, group), **options)


def dense_logp(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(logp, entropy) with all logits."""
    log_softmax = torch.log_softmax(h_TH.double() @ weight_VH.double()[:vocab_size].t() / temperature, dim=1)
    return log_softmax.gather(1, target_T[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(1)


def dense_statistic(
    statistic: Statistic | None, log_softmax_TV: torch.Tensor, logp_T: torch.Tensor
) -> torch.Tensor | None:
    """A method's statistic [T], of all log-probs at once."""
    if statistic is None:
        return None
    best_T, logp_T = log_softmax_TV.amax(dim=1), logp_T.detach()
    sum_T = statistic.terms(log_softmax_TV, best_T[:, None]).sum(dim=1)
    return statistic.value(sum_T, logp_T, best_T, log_softmax_TV.shape[1]).detach()


def dense(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, batch: TokenBatch, method: Method,
    upstream: float = 1.0, **options: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Loss, log-probs, entropies and both gradients in float64; the entropy bonus by hand, sample by sample."""
    h_TH, weight_VH = (value.double().clone().requires_grad_() for value in (h_TH, weight_VH))
    logp_T, entropy_T = dense_logp(h_TH, weight_VH, target_T, **options)
    loss = dense_loss(replace(method, entropy_coef=0.0), logp_T, batch).loss_sum
    for sample in range(batch.num_samples):
        own_T = batch.mask_T & (batch.sample_T == sample)
        share = 1 / max(int(own_T.sum()), 1) if method.divisor == "samples" else 1.0
        loss = loss - method.entropy_coef * share * entropy_T[own_T].sum()
    dh, dweight = torch.autograd.grad(upstream * loss, (h_TH, weight_VH))
    found = {"loss": loss, "logp": logp_T, "entropy": entropy_T, "dh": dh, "dweight": dweight}
    return {name: value.detach() for name, value in found.items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value, rtol=tolerance, atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
