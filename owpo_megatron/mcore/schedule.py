"""One forward-backward (or forward-only) pass over packed microbatches through megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from owpo_megatron.head import Fp8Error, Fp8Weight, LogProbs, PolicyHeadOut
from owpo_megatron.head.policy_head import BatchOf
from owpo_megatron.mcore.packing import Microbatch
from owpo_megatron.mcore.transformer import PolicyModel
from owpo_megatron.types import LogpMode, Objective

Collected = TypeVar("Collected")


def forward_backward(
    chunks: list[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    objective: Objective,
    batch_of: Callable[[Microbatch], BatchOf],
    collect: Callable[[PolicyHeadOut], Collected],
) -> list[Collected]:
    """Accumulate gradients of sum(loss) / sum(count over all ranks) in main_grad.

    Returns what `collect` makes of each microbatch, on the last pipeline stage (empty elsewhere).
    """

    def loss(
        microbatch: Microbatch, model: PolicyModel, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        out = model.policy_head(hidden, microbatch.target_T[0], microbatch.mask_T[0], batch_of(microbatch), objective)
        return out.loss_sum, out.num_tokens.int(), collect(out)

    return _run(chunks, microbatches, loss, forward_only=False)


@torch.no_grad()
def forward_logprobs(
    chunks: list[DistributedDataParallel], microbatches: Sequence[Microbatch], mode: LogpMode = "exact"
) -> list[tuple[Microbatch, LogProbs]]:
    """(microbatch, its log-probs) of each, on the last pipeline stage (empty elsewhere).

    For FP8 the head's weight is quantised once a pass, so that no version of it can be stale.
    """
    quantised: list[Fp8Weight] = []

    def collect(microbatch: Microbatch, model: PolicyModel, hidden: torch.Tensor, non_loss_data: bool) -> Any:
        assert non_loss_data
        if mode != "exact" and not quantised:
            quantised.append(model.quantised_head())
        fp8_weight = quantised[0] if quantised else None
        return microbatch, model.logprobs(hidden, microbatch.target_T[0], microbatch.mask_T[0], mode, fp8_weight)

    return _run(chunks, microbatches, collect, forward_only=True)


@torch.no_grad()
def forward_fp8_errors(chunks: list[DistributedDataParallel], microbatches: Sequence[Microbatch]) -> list[Fp8Error]:
    """Of each microbatch, on the last pipeline stage (empty elsewhere)."""

    def collect(microbatch: Microbatch, model: PolicyModel, hidden: torch.Tensor, non_loss_data: bool) -> Any:
        assert non_loss_data
        return model.fp8_error(hidden, microbatch.target_T[0], microbatch.mask_T[0])

    return _run(chunks, microbatches, collect, forward_only=True)


def _run(
    chunks: list[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    finish: Callable[..., Any],
    forward_only: bool,
) -> list[Any]:
    def forward_step(iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        microbatch = next(iterator)
        hidden = model(microbatch.token_T, microbatch.position_T, None, packed_seq_params=microbatch.packed_seq_params)
        return hidden, partial(finish, microbatch, model.module)

    iterators = [iter(microbatches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=max(microbatch.token_T.shape[1] for microbatch in microbatches),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
