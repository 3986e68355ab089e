"""owpo bench head --device cuda: our passes and the installed peers on one GPU. Not run on a GPU yet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from owpo_megatron.bench.head import DENSITIES, ExactGradients, HeadProblem
from owpo_megatron.bench.head_peers import PEERS, Peer
from owpo_megatron.bench.peak_memory import PeakMemory
from owpo_megatron.head import Fp8Weight, Head
from owpo_megatron.methods import Method
from owpo_megatron.types import LogpMode

SHAPES = (
    (16384, 4096, 151936),
    (16384, 3584, 151936),
    (16384, 4096, 37984),  # one rank's shard of the first at tensor parallelism 4
    (1024, 896, 151936),
)
CHECKED = 256  # rows compared with float64

Row = dict[str, Any]


def measure(
    method: Method, shapes: Sequence[tuple[int, int, int]] = SHAPES, budget_seconds: float = 540.0,
    peers: Sequence[Peer] = PEERS,
) -> Iterator[Row]:  # fmt: skip
    """Yield rows {impl, work, tokens, hidden, vocab, density, ms, extra_peak_bytes, tflops, max_abs_error}.

    `tflops` counts the minimum work (2 T V H without gradients, 6 T V H with), so that recomputation shows as a lower
    rate. A peer that is not installed, or fails, gets a row with `error`. No row is started after the time budget.
    """
    end = time.monotonic() + budget_seconds
    for tokens, hidden, vocab in shapes:
        problem = HeadProblem.random(tokens, hidden, vocab, "cuda", torch.bfloat16)
        where = {"tokens": tokens, "hidden": hidden, "vocab": vocab}
        for impl, work, density, flop, run, error in _runs(problem, method, peers):
            row: Row = {"impl": impl, "work": work, **where, "density": density}
            if time.monotonic() > end:
                return
            try:
                row |= _timed(run, flop)
                row["max_abs_error"] = error() if error else None
            except Exception as failure:  # a peer may fail in any way; record it in its row and continue
                row["error"] = f"{type(failure).__name__}: {failure}"[:200]
            yield row
            torch.cuda.empty_cache()
        del problem


Run = tuple[str, str, float, float, Callable[[], object], Callable[[], float] | None]


def _runs(problem: HeadProblem, method: Method, peers: Sequence[Peer]) -> Iterator[Run]:
    (tokens, hidden), vocab = problem.h_TH.shape, len(problem.weight_VH)
    flop = 2.0 * tokens * hidden * vocab
    yield from _gemms(problem)
    exact_C, exact_dh_CH = _float64(problem)
    found: dict[str, torch.Tensor] = {}

    def logp_error() -> float:
        return (found["logp"][:CHECKED].double() - exact_C).abs().max().item()

    def dh_error() -> float:
        return (found["dh"][:CHECKED].double() - exact_dh_CH).abs().max().item()

    head = Head(problem.weight_VH)  # quantises once, as a pass does
    modes: tuple[LogpMode, ...] = ("exact", "fp8_refined", "fp8_raw")
    for mode in modes:

        def without_gradients(mode: LogpMode = mode) -> None:
            found["logp"] = head.logprobs(problem.h_TH, problem.target_T, mode=mode).logp_T

        yield f"ours, {mode}", "log-probs", 1.0, flop, without_gradients, logp_error

    exact = ExactGradients(problem)
    main_grad = torch.zeros(vocab, hidden, device="cuda")
    for mode in modes[:2]:
        for density in DENSITIES:
            given = _in_mode(problem.at_density(density), mode)

            def with_gradients(given: HeadProblem = given, mode: LogpMode = mode) -> torch.Tensor:
                h_TH, weight_VH = given.h_TH.detach().requires_grad_(), given.weight_VH.detach().requires_grad_()
                weight_VH.main_grad = main_grad  # type: ignore[attr-defined]
                Head(weight_VH).loss(h_TH, given.target_T, given.batch, method, mode).loss_sum.backward()
                assert h_TH.grad is not None
                return h_TH.grad

            def gradient_error(given: HeadProblem = given, run: Callable[[], torch.Tensor] = with_gradients) -> float:
                main_grad.zero_()
                return exact.error(given, method, (torch.zeros(()), run(), main_grad))

            yield f"ours, {mode}", "loss and gradients", density, 3 * flop, with_gradients, gradient_error
    for peer in peers:
        try:
            function = peer.load()
        except (ImportError, AttributeError) as failure:
            reason = f"not available: {failure}"

            def absent(reason: str = reason) -> None:
                raise ImportError(reason)

            yield peer.name, "log-probs", 1.0, flop, absent, None
            continue

        def peer_logp(function: Any = function) -> None:
            with torch.no_grad():
                found["logp"] = function(problem.h_TH, problem.weight_VH, problem.target_T)

        def peer_gradients(function: Any = function, per_token: bool = peer.per_token) -> None:
            h_TH, weight_VH = problem.h_TH.detach().requires_grad_(), problem.weight_VH.detach().requires_grad_()
            value = function(h_TH, weight_VH, problem.target_T)
            (-value.float().sum() if per_token else value).backward()
            assert h_TH.grad is not None
            found["dh"] = h_TH.grad

        work = "gradients" if peer.per_token else "gradients of the sum only"
        if peer.per_token:
            yield peer.name, "log-probs", 1.0, flop, peer_logp, logp_error
        yield peer.name, work, 1.0, 3 * flop, peer_gradients, dh_error


def _in_mode(problem: HeadProblem, mode: LogpMode) -> HeadProblem:
    """The problem with its log-probs declared to be of this mode; their values are those of a policy nearby anyway."""
    return replace(problem, batch=replace(problem.batch, old_mode=mode, ref_mode=mode))


def _float64(problem: HeadProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logp, d(-sum logp)/dh) of the first rows."""
    h, weight, target = problem.h_TH[:CHECKED].double(), problem.weight_VH.double(), problem.target_T[:CHECKED]
    log_p = torch.log_softmax(h @ weight.t(), 1)
    return log_p.gather(1, target[:, None])[:, 0], log_p.exp() @ weight - weight[target]


def _gemms(problem: HeadProblem) -> Iterator[Run]:
    """Yield the upper bound on speed: the GEMMs alone, on at most 4,096 rows."""
    h, weight = problem.h_TH[:4096], problem.weight_VH
    flop = 2.0 * h.shape[0] * h.shape[1] * len(weight)
    wide = torch.empty(len(h), len(weight), device="cuda")
    dlogits = torch.randn(len(h), len(weight), device="cuda", dtype=torch.bfloat16)
    total = torch.zeros(weight.shape, device="cuda")
    mm, addmm = torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out
    yield "GEMM bf16", "GEMM", 1.0, flop, lambda: torch.mm(h, weight.t()), None
    yield "GEMM to fp32", "GEMM", 1.0, flop, lambda: mm(h, weight.t(), torch.float32, out=wide), None
    yield "GEMM dgrad", "GEMM", 1.0, flop, lambda: torch.mm(dlogits, weight), None
    yield (
        "GEMM wgrad, fp32 sum",
        "GEMM",
        1.0,
        flop,
        lambda: addmm(total, dlogits.t(), h, torch.float32, out=total),
        None,
    )
    fp8 = Fp8Weight(weight)
    yield "GEMM FP8 with quantisation of h", "GEMM", 1.0, flop, lambda: fp8.logits(h), None


def _timed(run: Callable[[], object], flop: float, repeats: int = 5) -> Row:
    for _ in range(2):
        run()
    times = []
    with PeakMemory(torch.device("cuda")) as memory:
        for _ in range(repeats):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
    ms = statistics.median(times)
    return {"ms": ms, "extra_peak_bytes": memory.extra_bytes, "tflops": flop / ms / 1e9}
