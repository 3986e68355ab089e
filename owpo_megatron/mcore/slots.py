"""Reference weights in a second slot of the policy's model: shared modules and layout and, right after a swap, memory.

With the distributed optimizer every parameter is a view into one contiguous buffer per dtype. A second set of buffers
with the same layout is the reference's slot. Showing a slot re-points the parameters; a hard swap only records that the
reference is now the policy's slot, and the next optimizer step writes to the spare one. Nothing is copied, except in
fp32 the 1/DP shard that the optimizer updates in place (bf16 has separate masters).

megatron-core internals that are changed: `param_data` of buffers and buckets (the target of optimizer and all-gather),
`cached_param_buffer_shard_list` of bucket groups (views of the former), and the `.data` of the optimizer's shards.
A gather of parameters that is still under way (chunks.py) goes to the policy's slot, whichever is shown; who takes a
slot's buffers waits for it. Not covered: expert-parallel buffers of another dtype, FP8 parameters.

Further slots hold weights that never change: teachers. In addition there may be one candidate, in host memory and in
the slots' layout: the policy at the best evaluation of a stage. Each rank keeps its own buffers, so that keeping it and
swapping to it need no communication.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.chunks import Chunks
from owpo_megatron.mcore.optimizer import distributed_optimizers


class ParameterSlots:
    """The buffers of policy and reference, and which of them the model's parameters view.

    Invariants: outside `showing_reference` the parameters are views of the policy's slot; while `aliased` the
    reference has no slot of its own and equals the policy's weights bit for bit.

    Args:
        placement: "resident" keeps the reference on the device; "offloaded" keeps it in host memory and copies it to
            the device for `showing_reference` only, so that the first step after a swap copies it to the host; "none",
            for methods without a reference, keeps it aliased and never creates a second slot.
    """

    def __init__(self, chunks: Chunks, optimizer: MegatronOptimizer, placement: str):
        self._layout = _Layout(chunks, optimizer)
        self._resident = placement == "resident"
        self._kept = placement != "none"
        self.aliased = True
        self.shows_policy = True  # False inside `showing_reference`
        self._policy = _Slot(self._layout, self._layout.current_buffers())
        self._spare: _Slot | None = None  # resident: the reference when not aliased
        self._host: list[torch.Tensor] | None = None  # offloaded: the reference when not aliased
        self._candidate: list[torch.Tensor] | None = None
        self._further: dict[str, _Slot | list[torch.Tensor]] = {}

    @property
    def keeps_reference(self) -> bool:
        """Whether there is a reference to save, hash or restore; False for a method without one."""
        return self._kept

    def swap(self) -> None:
        """Make the policy's current weights the reference. Do not call between a forward and its backward."""
        self.aliased = True

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the current parameters to host memory, as the candidate for `swap_to_candidate`."""
        assert self.shows_policy
        self._candidate = _to_host(self._policy.buffers, self._candidate)

    @torch.no_grad()
    def swap_to_candidate(self) -> None:
        """Make the weights copied by `keep` the reference; the policy is unchanged. Call `keep` before each."""
        assert self._candidate is not None and self.shows_policy
        if self._resident:
            self._spare = self._spare or _Slot(self._layout, [torch.empty_like(d) for d in self._policy.buffers])
            for to, of in zip(self._spare.buffers, self._candidate, strict=True):
                to.copy_(of)
        else:
            self._host, self._candidate = self._candidate, None
        self.aliased = False

    @torch.no_grad()
    def copy_reference_to_policy(self) -> None:
        """Copy the reference's weights to the policy's parameters; the caller must reset the optimizer's masters."""
        assert self.shows_policy
        if not self.aliased:
            for to, of in zip(self._policy.buffers, self._reference().buffers, strict=True):
                to.copy_(of)
            self.aliased = True

    @torch.no_grad()
    def before_step(self) -> None:
        """Ensure that optimizer.step cannot change the reference; call right before each step."""
        assert self.shows_policy, "an optimizer step while the parameters are the reference's"
        if not (self.aliased and self._kept):
            return
        self.aliased = False
        if not self._resident:
            self._host = _to_host(self._policy.buffers, self._host)
            return
        # Zeros, as in megatron's buffers: the gaps between parameters are hashed too.
        target = self._spare or _Slot(self._layout, [torch.zeros_like(data) for data in self._policy.buffers])
        self._policy, self._spare = target, self._policy
        target.own()
        target.show()

    @contextlib.contextmanager
    def showing_reference(self) -> Iterator[None]:
        """Context in which forward passes use the reference. No backward, optimizer step or weight sync inside."""
        with self._showing(None if self.aliased else self._reference()):
            yield

    @contextlib.contextmanager
    def showing(self, name: str) -> Iterator[None]:
        """Context in which forward passes use a further slot, with the same restrictions."""
        with self._showing(self._on_device(self._further[name])):
            yield

    @contextlib.contextmanager
    def showing_teacher(self) -> Iterator[None]:
        """The same with the only further slot, or with the reference where there is none."""
        assert len(self._further) < 2, "several teachers"
        with self.showing(next(iter(self._further))) if self._further else self.showing_reference():
            yield

    @contextlib.contextmanager
    def filling(self, name: str, resident: bool) -> Iterator[None]:
        """Context in which the parameters view a new slot; load weights there. `resident`: keep it on the device."""
        slot = _Slot(self._layout, [torch.zeros_like(data) for data in self._policy.buffers])
        with self._showing(slot):
            yield
        self._further[name] = slot if resident else _to_host(slot.buffers)

    @contextlib.contextmanager
    def _showing(self, slot: _Slot | None) -> Iterator[None]:
        assert self.shows_policy, "another slot is shown already"
        self.shows_policy = False
        try:
            if slot is not None:
                slot.show()
            yield
        finally:
            self._policy.show()
            self.shows_policy = True

    @torch.no_grad()
    def load_reference(self) -> None:
        """Make a copy of the current parameters the reference; then other weights can be loaded into the policy."""
        if self._resident:
            self._spare = _Slot(self._layout, [data.clone() for data in self._policy.buffers])
        else:
            self._host = _to_host(self._policy.buffers, self._host)
        self.aliased = False

    def digest(self) -> str:
        """Return the SHA-256 of this rank's share of the reference's weights."""
        held = self._reference_where_it_is()
        sha = hashlib.sha256()
        for data in held.buffers if isinstance(held, _Slot) else held:
            sha.update(data.detach().cpu().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def _reference(self) -> _Slot:
        return self._on_device(self._reference_where_it_is())

    def _reference_where_it_is(self) -> _Slot | list[torch.Tensor]:
        held = self._policy if self.aliased else self._spare if self._resident else self._host
        assert held is not None
        return held

    def _on_device(self, held: _Slot | list[torch.Tensor]) -> _Slot:
        if isinstance(held, _Slot):
            return held
        return _Slot(self._layout, [data.to(cpu.device(), non_blocking=True) for data in held])


class _Layout:
    """The places in which megatron keeps views of parameter memory."""

    def __init__(self, chunks: Chunks, optimizer: MegatronOptimizer):
        self.chunks = chunks
        self.buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        self.optimizers = distributed_optimizers(optimizer)
        self.bucket_groups = [g for chunk in chunks for g in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
        for one in self.optimizers:
            for groups in one.per_model_bucket_groups.values():
                self.bucket_groups.extend(groups)
        assert all(buffer.param_data is not None for buffer in self.buffers), "needs the distributed optimizer"

    def current_buffers(self) -> list[torch.Tensor]:
        return [buffer.param_data for buffer in self.buffers]


class _Slot:
    """One set of buffers with all views that megatron needs, created once, so that a switch only writes pointers."""

    def __init__(self, layout: _Layout, buffers: list[torch.Tensor]):
        self._buffers = buffers
        self._layout = layout
        self._params = [
            (param, data[start:end].view(param.shape))
            for buffer, data in zip(layout.buffers, buffers, strict=True)
            for param, (start, end, _) in buffer.param_index_map.items()
        ]
        self._buckets = [
            (bucket, data[bucket.offset : bucket.offset + bucket.param_data.numel()])
            for buffer, data in zip(layout.buffers, buffers, strict=True)
            for bucket in buffer.buckets
        ]
        self._shards = [shard for optimizer in layout.optimizers for shard in self._optimizer_shards(optimizer)]

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The buffers, with nothing under way to them."""
        self._layout.chunks.finish()
        return self._buffers

    def show(self) -> None:
        """Let forward passes use this slot."""
        for param, view in self._params:
            param.data = view

    def own(self) -> None:
        """Make this slot the target of optimizer and all-gather; fp32 shards are copied over."""
        for buffer, data in zip(self._layout.buffers, self.buffers, strict=True):
            buffer.param_data = data
        for bucket, view in self._buckets:
            bucket.param_data = view
        for group in self._layout.bucket_groups:
            group.cached_param_buffer_shard_list = [None] * len(group.buckets)
        for shard, view, carried in self._shards:
            if carried:
                view.copy_(shard)
            shard.data = view

    def _optimizer_shards(self, optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
        """Yield (the optimizer's tensor, this slot's view of it, whether it is the only copy: no separate master)."""
        bucket_views = {id(bucket): view for bucket, view in self._buckets}
        for model_groups, shard_groups, carried in (
            (optimizer.model_float16_groups, optimizer.shard_float16_groups, False),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups, True),
        ):
            for model_group, shard_group in zip(model_groups, shard_groups, strict=True):
                for model_param, shard in zip(model_group, shard_group, strict=True):
                    buffer_index, _, bucket_index = optimizer.model_param_gbuf_map[model_param]
                    bucket = optimizer.buffers[buffer_index].buckets[bucket_index]
                    where = optimizer._get_model_param_range_map(model_param)["gbuf_world_in_bucket"]
                    yield shard, bucket_views[id(bucket)][where.start : where.end], carried


def _to_host(buffers: list[torch.Tensor], into: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Copy buffers to pinned memory, reusing `into` if given: pinning takes longer than the copy."""
    if into is None:
        into = [torch.empty_like(data, device="cpu", pin_memory=not cpu.on_cpu()) for data in buffers]
    for to, of in zip(into, buffers, strict=True):
        to.copy_(of)
    return into
