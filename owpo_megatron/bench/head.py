"""owpo bench head on a CPU: the training head against dense log_softmax with autograd, eager and compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from owpo_megatron.bench.peak_memory import PeakMemory
from owpo_megatron.head import Head
from owpo_megatron.methods import Method, dense_loss
from owpo_megatron.types import TokenBatch

DENSITIES = (1.0, 0.6, 0.4)
SHAPES = ((512, 256, 16384),)  # less than a minute of CPU, imports and compiler included
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # loss, dh, dweight


@dataclass(frozen=True)
class HeadProblem:
    """Inputs of one measurement: T tokens, H hidden, V vocabulary; old and reference log-probs near the policy's."""

    h_TH: torch.Tensor
    weight_VH: torch.Tensor
    target_T: torch.Tensor
    batch: TokenBatch

    @classmethod
    def random(
        cls, tokens: int, hidden: int, vocab: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> HeadProblem:
        """Build peaked distributions, as of a language model, with targets near the peak; no token is clipped."""
        generator = torch.Generator().manual_seed(0)
        weight_VH = torch.randn(vocab, hidden, generator=generator) / hidden**0.5
        target_T = torch.randint(0, vocab, (tokens,), generator=generator)
        h_TH = torch.randn(tokens, hidden, generator=generator)
        h_TH += (
            weight_VH[target_T] * torch.linspace(6, 16, tokens)[torch.randperm(tokens, generator=generator)][:, None]
        )
        h_TH, weight_VH = (value.to(device=device, dtype=dtype) for value in (h_TH, weight_VH))
        target_T = target_T.to(device)
        logp_T = exact_logp(h_TH, weight_VH, target_T)
        sign_T = (torch.randint(0, 2, (tokens,), generator=generator) * 2 - 1).to(device)
        batch = TokenBatch(
            old_logp_T=logp_T + 0.02 * torch.randn(tokens, generator=generator).to(device),
            ref_logp_T=logp_T + 0.1 * torch.randn(tokens, generator=generator).to(device),
            advantage_T=sign_T * (0.5 + torch.rand(tokens, generator=generator).to(device)),
            active_T=torch.ones(tokens, dtype=torch.bool, device=device),
            mask_T=torch.ones(tokens, dtype=torch.bool, device=device),
            sample_T=torch.zeros(tokens, dtype=torch.int64, device=device),
            num_samples=1,
        )
        return cls(h_TH, weight_VH, target_T, batch)

    def at_density(self, density: float) -> HeadProblem:
        """Return a copy in which only the fraction `density` of rows has a gradient; the others' advantage is zero."""
        rank_T = torch.randperm(len(self.target_T), generator=torch.Generator().manual_seed(1)).to(self.target_T.device)
        kept_T = rank_T < round(density * len(rank_T))
        return replace(self, batch=replace(self.batch, advantage_T=self.batch.advantage_T * kept_T))


@torch.no_grad()
def exact_logp(h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """Compute fp32 log-probs, 256 rows at a time."""
    parts = []
    for start in range(0, len(h_TH), 256):
        rows = slice(start, start + 256)
        logits = h_TH[rows].float() @ weight_VH.float().t()
        parts.append(logits.gather(1, target_T[rows, None])[:, 0] - torch.logsumexp(logits, 1))
    return torch.cat(parts)


def ours(problem: HeadProblem, method: Method) -> Gradients:
    h_TH, weight_VH = _leaves(problem)
    out = Head(weight_VH).loss(h_TH, problem.target_T, problem.batch, method)
    return _gradients(out.loss_sum, h_TH, weight_VH)


def dense(problem: HeadProblem, method: Method, logp: Callable[..., torch.Tensor] | None = None) -> Gradients:
    """Compute as a training loop without a head kernel does: all logits, log_softmax, gather, autograd."""
    h_TH, weight_VH = _leaves(problem)
    logp_T = (logp or dense_logp)(h_TH, weight_VH, problem.target_T)
    return _gradients(dense_loss(method, logp_T, problem.batch).loss_sum, h_TH, weight_VH)


def dense_logp(h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax((h_TH @ weight_VH.t()).float(), dim=1).gather(1, target_T[:, None])[:, 0]


def _leaves(problem: HeadProblem) -> tuple[torch.Tensor, torch.Tensor]:
    return problem.h_TH.detach().requires_grad_(), problem.weight_VH.detach().requires_grad_()


def _gradients(loss: torch.Tensor, h_TH: torch.Tensor, weight_VH: torch.Tensor) -> Gradients:
    dh_TH, dweight_VH = torch.autograd.grad(loss, (h_TH, weight_VH))
    return loss.detach(), dh_TH, dweight_VH


class ExactGradients:
    """float64 gradients of some rows, in closed form; shares no code with the measured implementations.

    Covers dh of 128 tokens and dweight of 1024 vocabulary rows, half of them of targets, where it is largest.
    """

    def __init__(self, problem: HeadProblem):
        self._h_TH, self._weight_VH = problem.h_TH.double(), problem.weight_VH.double()
        self._target_T = problem.target_T
        chunks = torch.arange(len(self._h_TH), device=self._h_TH.device).split(128)
        self._lse_T = torch.cat([torch.logsumexp(self._h_TH[rows] @ self._weight_VH.t(), 1) for rows in chunks])
        self._tokens = chunks[len(chunks) // 2]
        self._columns = torch.cat([torch.arange(512, device=self._target_T.device), self._target_T[:512]]).unique()
        self._columns = self._columns[self._columns < len(self._weight_VH)]

    def error(self, given: HeadProblem, method: Method, found: Gradients) -> float:
        """Return the largest absolute error of dh and dweight."""
        logp_T = (self._h_TH * self._weight_VH[self._target_T]).sum(1) - self._lse_T
        leaf_T = logp_T.requires_grad_()
        (dlogp_T,) = torch.autograd.grad(dense_loss(method, leaf_T, given.batch).loss_sum, leaf_T)
        tokens, columns = self._tokens, self._columns
        p_TV = torch.exp(self._h_TH[tokens] @ self._weight_VH.t() - self._lse_T[tokens, None])
        dh = dlogp_T[tokens, None] * (self._weight_VH[self._target_T[tokens]] - p_TV @ self._weight_VH)
        p_TV = torch.exp(self._h_TH @ self._weight_VH[columns].t() - self._lse_T[:, None])
        dlogits = ((self._target_T[:, None] == columns).double() - p_TV) * dlogp_T[:, None]
        dweight = dlogits.t() @ self._h_TH
        return max(
            (found[1][tokens].double() - dh).abs().max().item(),
            (found[2][columns].double() - dweight).abs().max().item(),
        )


def measure_shapes(
    method: Method, shapes: Sequence[tuple[int, int, int]] = SHAPES, repeats: int = 3
) -> Iterator[dict[str, Any]]:
    """Rows of `measure` for (tokens, hidden, vocabulary) after another, with these sizes in each."""
    for tokens, hidden, vocab in shapes:
        where = {"tokens": tokens, "hidden": hidden, "vocab": vocab}
        for row in measure(HeadProblem.random(tokens, hidden, vocab), method, repeats=repeats):
            yield where | row


def measure(
    problem: HeadProblem, method: Method, densities: Sequence[float] = DENSITIES, repeats: int = 5
) -> Iterator[dict[str, Any]]:
    """Yield rows {impl, density, seconds, cpu_seconds, extra_peak_bytes, max_abs_error} of forward plus backward.

    Times are medians of interleaved runs, so that background load affects all implementations alike. `cpu_seconds`,
    summed over threads, hardly depends on that load. `extra_peak_bytes` includes the two gradients that every
    implementation returns. `max_abs_error` is that of dh and dweight against float64 (see ExactGradients).
    """
    compiled_logp = torch.compile(dense_logp)
    impls: dict[str, Callable[[HeadProblem], Gradients]] = {
        "ours": lambda given: ours(given, method),
        "dense": lambda given: dense(given, method),
        "compiled": lambda given: dense(given, method, compiled_logp),
    }
    exact = ExactGradients(problem)
    for density in densities:
        given = problem.at_density(density)
        found: dict[str, dict[str, Any]] = {}
        for name, run in impls.items():
            if density == densities[0]:
                run(given)  # warm-up: threads, pages, compiler
            with PeakMemory(given.h_TH.device) as memory:
                result = run(given)
            error = exact.error(given, method, result)
            del result
            found[name] = {"extra_peak_bytes": memory.extra_bytes, "max_abs_error": error}
        seconds: dict[str, list[float]] = {name: [] for name in impls}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in impls}
        for _ in range(repeats):
            for name, run in impls.items():
                started, cpu_started = time.perf_counter(), time.process_time()
                run(given)
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)
        for name in impls:
            row: dict[str, Any] = {"impl": name, "density": density, "seconds": statistics.median(seconds[name])}
            yield row | {"cpu_seconds": statistics.median(cpu_seconds[name])} | found[name]
