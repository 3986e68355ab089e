"""Other projects' kernels for the same computation, through their public functions; installed ones are measured.

Written against Liger 0.8.5, cut-cross-entropy 25.1.1, QuACK 0.6.5, verl 0.9.1 and Transformer Engine 2.20; none of
these calls has been run on a GPU yet. A peer returns per-token log-probs, which accept a method's upstream gradient, or
only a summed cross-entropy, which is half of the problem and kept for comparison.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PerToken = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (h, weight, target) -> logp [T] or sum


@dataclass(frozen=True)
class Peer:
    """`load` imports and returns the function; `per_token` is False if it returns only the sum of -logp."""

    name: str
    load: Callable[[], PerToken]
    per_token: bool = True


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _eager() -> PerToken:
    return lambda h, w, y: torch.log_softmax((h @ w.t()).float(), dim=1).gather(1, y[:, None])[:, 0]


def _compiled() -> PerToken:
    from torch.utils.checkpoint import checkpoint

    chunk = torch.compile(_eager())

    def run(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows = range(0, len(h), 2048)
        return torch.cat([checkpoint(chunk, h[i : i + 2048], w, y[i : i + 2048], use_reentrant=False) for i in rows])

    return run


def _cut_cross_entropy() -> PerToken:
    function = _attribute("cut_cross_entropy", "linear_cross_entropy")
    return lambda h, w, y: -function(h, w, y, reduction="none")


def _liger_scaled() -> PerToken:
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    function = _attribute(module, "LigerFusedLinearScaledCrossEntropyFunction")
    return lambda h, w, y: -function.apply(h, w, y)


def _liger_grpo() -> PerToken:
    function = _attribute("liger_kernel.chunked_loss.fused_linear_ppo", "_ChunkedSelectiveLogProbFunction")
    return lambda h, w, y: function.apply(h, w, y, None, 1.0, 4096)


def _liger_sum() -> PerToken:
    function = _attribute("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda h, w, y: function(h, w, y, reduction="sum")


def _quack(name: str) -> Callable[[], PerToken]:
    def load() -> PerToken:
        function = _attribute("quack.linear_cross_entropy", name)
        return lambda h, w, y: function(h, w, y, reduction="sum")

    return load


def _verl() -> PerToken:
    function = _attribute("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    return lambda h, w, y: function(h, w, y, 1.0, "none", None)[0]


def _transformer_engine() -> PerToken:
    function = _attribute("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")
    # (logits, target, label smoothing, reduce, group); logits [1, T, V]
    return lambda h, w, y: -function((h @ w.t())[None], y[None], 0.0, False, None)[0]


PEERS = (
    Peer("torch eager", _eager),
    Peer("torch.compile, chunks of 2048, checkpointed", _compiled),
    Peer("cut-cross-entropy", _cut_cross_entropy),
    Peer("Liger scaled cross-entropy", _liger_scaled),
    Peer("Liger GRPO log-probs", _liger_grpo),
    Peer("verl linear cross-entropy", _verl),
    Peer("Transformer Engine parallel cross-entropy", _transformer_engine),
    Peer("Liger fused linear cross-entropy", _liger_sum, per_token=False),
    Peer("QuACK chunked", _quack("chunked_linear_cross_entropy"), per_token=False),
    Peer("QuACK scaled-exp", _quack("scaled_exp_linear_cross_entropy"), per_token=False),
)


def installed() -> tuple[Peer, ...]:
    """The peers, with Megatron's where megatron-core is installed."""
    try:
        from owpo_megatron.mcore.cross_entropy import one_rank_cross_entropy
    except ImportError:
        return PEERS
    return (*PEERS, megatron(one_rank_cross_entropy()))


def megatron(cross_entropy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Peer:
    """Return Megatron's vocabulary-parallel cross-entropy as a peer; passed in, since this room does not import it.

    Args:
        cross_entropy: (logits [T, 1, V], target [T, 1]) -> loss [T, 1].
    """
    return Peer(
        "Megatron vocab-parallel cross-entropy",
        lambda: lambda h, w, y: -cross_entropy((h @ w.t())[:, None], y[:, None])[:, 0],
    )
