"""One forward-backward (or forward-only) pass over packed microbatches through megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from owpo_megatron.parallel.packing import Microbatch

# (logp_T, entropy_T, microbatch) -> (loss sum, token count, anything to collect)
LossFunction = Callable[[torch.Tensor, torch.Tensor, Microbatch], tuple[torch.Tensor, torch.Tensor, Any]]


def forward_backward(
    chunks: list[DistributedDataParallel], microbatches: Sequence[Microbatch], loss: LossFunction
) -> list[Any]:
    """Accumulate gradients of sum(loss) / sum(count over all ranks) in main_grad.

    Returns what `loss` collected of each microbatch, on the last pipeline stage (empty elsewhere).
    """

    def loss_func(microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        loss_sum, num_tokens, collected = loss(output[0], output[1], microbatch)
        return loss_sum, num_tokens.int(), collected

    return _run(chunks, microbatches, loss_func, forward_only=False)


@torch.no_grad()
def forward_logprobs(
    chunks: list[DistributedDataParallel], microbatches: Sequence[Microbatch]
) -> list[tuple[Microbatch, torch.Tensor]]:
    """(microbatch, logp_T) of each, on the last pipeline stage (empty elsewhere)."""

    def collect(microbatch: Microbatch, output: torch.Tensor, non_loss_data: bool) -> Any:
        assert non_loss_data
        return microbatch, output[0].detach()

    return _run(chunks, microbatches, collect, forward_only=True)


def _run(
    chunks: list[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    finish: Callable[..., Any],
    forward_only: bool,
) -> list[Any]:
    def forward_step(iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        microbatch = next(iterator)
        output = model(
            microbatch.token_T,
            microbatch.position_T,
            None,
            labels=microbatch.target_T,
            loss_mask=microbatch.mask_T,
            packed_seq_params=microbatch.packed_seq_params,
        )
        return output, partial(finish, microbatch)

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
