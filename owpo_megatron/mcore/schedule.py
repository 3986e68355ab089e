"""One forward-backward (or forward-only) pass over packed microbatches through megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from owpo_megatron.head import Head, HeadError, HeadLoss, LogProbs, TeacherRows, head_error
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.packing import Microbatch
from owpo_megatron.methods import Method
from owpo_megatron.methods.prepare import prepared_in_microbatch
from owpo_megatron.methods.statistic import Statistic
from owpo_megatron.types import LogpMode, TokenBatch

Collected = TypeVar("Collected")


def forward_backward(
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    method: Method,
    batch_of: Callable[..., TokenBatch],
    collect: Callable[[TokenBatch, HeadLoss], Collected],
    mode: LogpMode = "exact",
    teaching: Mapping[int, TeacherRows] | None = None,
) -> list[Collected]:
    """Accumulate gradients of sum(loss) / sum(count over all ranks) in main_grad.

    `batch_of` returns the inputs of the loss for a microbatch: this rank's rows, or with `whole=True` the pack's.
    `teaching` is what `forward_teacher` returned for these microbatches, for methods that compare whole vocabularies.
    Returns the result of `collect` for each microbatch, on the last pipeline stage (empty elsewhere).
    """

    def loss(microbatch: Microbatch, head: Head, h_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        batch = batch_of(microbatch)
        if microbatch.part is not None and method.coupling == "sample" and batch.given is None:
            found = head.logprobs(h_TH.detach(), microbatch.target_T[0], batch.row_mask_T, mode, method.statistic)
            own_values = [one for one in (found.logp_T, found.entropy_T, found.statistic_T) if one is not None]
            now = [microbatch.part.whole(value_O) for value_O in own_values]
            given = prepared_in_microbatch(method, batch_of(microbatch, whole=True), *now).given or {}
            own = {name: microbatch.own(value_T) for name, value_T in given.items()}
            batch = replace(batch, given=own, now_mode=mode)
        teacher = None if teaching is None else teaching[id(microbatch)]
        out = head.loss(h_TH, microbatch.target_T[0], batch, method, mode, teacher)
        return out.loss_sum, out.count.int(), collect(batch, out)

    return _run(chunks, microbatches, loss, forward_only=False)


@torch.no_grad()
def forward_logprobs(
    chunks: Sequence[DistributedDataParallel], microbatches: Sequence[Microbatch], mode: LogpMode = "exact",
    statistic: Statistic | None = None,
) -> list[tuple[Microbatch, LogProbs]]:  # fmt: skip
    """Return (microbatch, its log-probs) for each, on the last pipeline stage (empty elsewhere)."""

    def collect(microbatch: Microbatch, head: Head, h_TH: torch.Tensor) -> tuple[Microbatch, LogProbs]:
        return microbatch, head.logprobs(h_TH, microbatch.target_T[0], microbatch.mask_T[0], mode, statistic)

    return _run(chunks, microbatches, collect, forward_only=True)


@torch.no_grad()
def forward_teacher(
    chunks: Sequence[DistributedDataParallel], microbatches: Sequence[Microbatch]
) -> dict[int, TeacherRows]:
    """Return the rows of the weights that are shown by `id(microbatch)`, on the last pipeline stage ({} elsewhere).

    They hold H numbers per response token until they are dropped, and a copy of the output embedding.
    """
    weight: list[torch.Tensor] = []

    def collect(microbatch: Microbatch, head: Head, h_TH: torch.Tensor) -> tuple[int, TeacherRows]:
        if not weight:
            weight.append(head.weight_VH.detach().clone())  # a view would keep all of an offloaded slot on the device
        return id(microbatch), TeacherRows(h_TH[microbatch.mask_T[0]], weight[0])

    return dict(_run(chunks, microbatches, collect, forward_only=True))


@torch.no_grad()
def forward_head_errors(
    chunks: Sequence[DistributedDataParallel], microbatches: Sequence[Microbatch]
) -> list[HeadError]:
    """Return the FP8 head's error on each microbatch, on the last pipeline stage (empty elsewhere)."""

    def collect(microbatch: Microbatch, head: Head, h_TH: torch.Tensor) -> HeadError:
        return head_error(head, h_TH, microbatch.target_T[0], microbatch.mask_T[0])

    return _run(chunks, microbatches, collect, forward_only=True)


def on_host(sums: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Move the sums of all microbatches to the host in one copy: each waits for the device."""
    if not sums:
        return sums
    values = [value.to(cpu.device()) for one in sums for value in one.values()]
    parts = iter(torch.cat([value.reshape(-1) for value in values]).cpu().split([value.numel() for value in values]))
    return [{name: next(parts).view(value.shape) for name, value in one.items()} for one in sums]


def _run(
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    finish: Callable[[Microbatch, Head, torch.Tensor], Any],
    forward_only: bool,
) -> list[Any]:
    """Run a pass with one head: the weight does not change during it, and no head of an earlier pass can be used."""
    chunks = list(chunks)
    head: Head | None = None

    def at_the_end(microbatch: Microbatch, model: Any, hidden: torch.Tensor, non_loss_data: bool = False) -> Any:
        nonlocal head
        assert non_loss_data == forward_only
        if head is None:  # not before: its weight may be the last to arrive
            head = model.head()
        return finish(microbatch, head, model.whole(hidden))

    def forward_step(iterator: Iterator[Microbatch], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        microbatch = next(iterator)
        hidden = model(microbatch.token_T, microbatch.position_T, None, packed_seq_params=microbatch.packed_seq_params)
        return hidden, partial(at_the_end, microbatch, model.module)

    iterators = [iter(microbatches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=max(microbatch.length for microbatch in microbatches),  # megatron-core divides it by cp
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
