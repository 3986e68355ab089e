"""The policy: a sharded megatron model that gives log-probs, takes optimizer steps and names weights for engines."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig, ReferenceConfig
from owpo_megatron.errors import RunError
from owpo_megatron.families import HFModel, forward_flops
from owpo_megatron.head import TeacherRows, settled_mode
from owpo_megatron.mcore import checkpoint, cpu, fusions
from owpo_megatron.mcore.fp8_training import pack_multiple
from owpo_megatron.mcore.optimizer import (
    gradient_norm,
    make_optimizer,
    make_scheduler,
    restart_optimizer,
    step_with,
    wrap_ddp,
)
from owpo_megatron.mcore.packing import Microbatch, token_batch
from owpo_megatron.mcore.resting import RestingMemory
from owpo_megatron.mcore.schedule import (
    forward_backward,
    forward_head_errors,
    forward_logprobs,
    forward_teacher,
    on_host,
)
from owpo_megatron.mcore.slots import ParameterSlots
from owpo_megatron.mcore.spec import fusions_of, transformer_config
from owpo_megatron.mcore.state_writer import StateWriter
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.mcore.transformer import build_chunks
from owpo_megatron.mcore.weights import load_model_weights
from owpo_megatron.methods import Method
from owpo_megatron.methods.statistic import Statistic
from owpo_megatron.policy.leaving import LeavingWeights
from owpo_megatron.policy.packs import Packs, Plan, homes_of
from owpo_megatron.policy.sums import microbatch_sums, over_ranks
from owpo_megatron.policy.values import PassValues, not_finite
from owpo_megatron.types import LogpMode, Sample

log = logging.getLogger(__name__)


class MegatronPolicy:
    """Implements the Policy protocol on megatron-core. Every method is collective over all ranks.

    Args:
        model: whose weights it starts from (HF, or megatron made by tools/convert_hf_to_megatron.py).
        reference: None for a method without a reference, which then costs no memory.
        hf: what the model is.
        temperature: sampling temperature of the rollouts; log-probs are those of logits / temperature.
        raw: fields of megatron-core's TransformerConfig, the section `megatron`.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        reference: ReferenceConfig | None,
        hf: HFModel,
        topology: Topology,
        temperature: float = 1.0,
        raw: Mapping[str, Any] | None = None,
    ):
        self.hf = hf
        self.topology = topology
        self.on_bad_gradient: Callable[[str], None] = _end_the_run
        """Called on every rank with the cause where an update's gradient is not finite; the update is skipped where it
        returns."""
        self.fetch: Callable[[Sequence[Sample], Sequence[int]], list[Sample]] = _already_here
        """Returns the samples with their tokens on the data-parallel rank that is given for each; collective."""
        self.logp_mode: LogpMode = model.head
        self._head_settled = model.head == "exact"
        self.dtype = dtype = getattr(torch, model.dtype)
        megatron_config = transformer_config(hf, parallel, dtype, dict(raw or {}))
        self.fused_kernels = "" if cpu.on_cpu() else fusions.line(fusions_of(hf), raw or {})
        """Which kernels are fused, in a line; empty on a CPU."""
        # each context-parallel rank's part of a pack is a multiple of this, and all parts together one of 2 cp tokens
        pad_to = topology.context.size * pack_multiple(megatron_config, topology.tp_size)
        if topology.context.size > 1:
            pad_to = math.lcm(pad_to, topology.context.multiple)
        matmul_flops, attention_flops = forward_flops(hf)
        self._packs = Packs(topology, optimizer.tokens_per_microbatch, pad_to, attention_flops / matmul_flops)
        chunks = build_chunks(hf, megatron_config, temperature)
        self._chunks = wrap_ddp(chunks, megatron_config, parallel.overlap)
        self._leaving = LeavingWeights(hf, self._chunks, topology)
        self._has_weights = False
        own_reference = reference.path if reference else None
        self.load_weights(own_reference or model.path)
        self._optimizer = make_optimizer(self._chunks, optimizer, dtype)
        self._scheduler = make_scheduler(self._optimizer, optimizer)
        self.slots = ParameterSlots(self._chunks, self._optimizer, reference.placement if reference else "none")
        if own_reference:
            self.slots.load_reference()
            self.load_weights(model.path)
            self._optimizer.reload_model_params()
        self._memory = RestingMemory(
            self._chunks, self._optimizer, optimizer.offload, getattr(torch, optimizer.moments)
        )

    def load_weights(self, path: Path) -> None:
        load_model_weights(path, self._chunks, self.hf, self.topology, again=self._has_weights)
        self._has_weights = True

    # ------------------------------------------------------------------------------------------ passes
    def homes(self, samples: Sequence[Sample]) -> list[int]:
        """The data-parallel rank that each sample is passed through the model on, in a pass over all of these."""
        return homes_of(self._packs.plan(samples))

    def logprobs(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """fp32 log-probs [L] of each sample's response tokens at the rollout temperature, on the host; 0 for those
        that it did not generate. On the ranks of each sample's home; on every rank for samples without one."""
        return self._of_tokens(samples, "logp_T")[0]

    def logprobs_and_entropies(self, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The same, with the entropy [L] of the distribution that each response token was drawn from; one pass."""
        logps, entropies = self._of_tokens(samples, "logp_T", "entropy_T")
        return logps, entropies

    def logprobs_and_statistics(
        self, samples: Sequence[Sample], statistic: Statistic
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """The same, with a method's own statistic [L] of the vocabulary at each response token."""
        names = ("logp_T", "entropy_T", "statistic_T")
        logps, entropies, statistics = self._of_tokens(samples, *names, statistic=statistic)
        return logps, entropies, statistics

    def update(self, samples: Sequence[Sample], method: Method) -> dict[str, Any]:
        """One optimizer step. Returns sums over the minibatch's tokens, and `grad_norm` and `lr`.

        A minibatch without a sample that counts leaves weights, optimizer and learning rate as they are, and so does a
        gradient that is not finite, where `on_bad_gradient` returns: `skipped` is 1 then, and there are no sums.

        Raises:
            RunError: on every rank, where the gradient is not finite; nothing has changed.
        """
        self._memory.wake()
        samples, microbatches = self._built(samples, self._packs.plan(samples))
        self._settle_head(microbatches)
        teaching = self._teaching(microbatches) if method.whole_vocabulary else None
        with self._chunks.in_training() as chunks:
            for chunk in chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            collected = forward_backward(
                chunks, microbatches, method, partial(token_batch, samples), microbatch_sums, self.logp_mode, teaching
            )
        metrics = over_ranks(self.topology, on_host(collected))
        if not metrics["loss_count"]:
            if self.topology.is_main:
                log.warning("no sample of this minibatch counts: its optimizer step is skipped")
            return metrics | {"grad_norm": 0.0, "lr": float(self._optimizer.param_groups[0]["lr"])}
        with cpu.scope():
            grad_norm = gradient_norm(self._optimizer)
        if not math.isfinite(grad_norm):
            lr = float(self._optimizer.param_groups[0]["lr"])
            self.on_bad_gradient(f"the gradient's norm is {grad_norm} {self._cause(samples, lr)}")
            return {"grad_norm": 0.0, "lr": lr, "loss_count": 0.0, "skipped": 1}
        self._scheduler.step(1)
        with self._memory.with_state():
            self.slots.before_step()
            with cpu.scope():
                step_with(self._optimizer, self._chunks, grad_norm)
        return metrics | {"grad_norm": grad_norm, "lr": float(self._optimizer.param_groups[0]["lr"])}

    def weights_are_finite(self) -> bool:
        """Whether no parameter is NaN or infinite, on any rank. Collective."""
        parameters = (parameter for chunk in self._chunks for parameter in chunk.parameters())
        return all(self.topology.all_gather(all(bool(one.isfinite().all()) for one in parameters)))

    def weights_digest(self) -> str:
        """16 hex digits of all ranks' parameters, bit for bit; comparable within one parallel layout. Collective."""
        bits = {2: torch.int16, 4: torch.int32}
        sums = [
            one.detach().view(bits[one.element_size()]).sum(dtype=torch.int64)
            for chunk in self._chunks
            for one in chunk.parameters()
        ]
        found = self.topology.all_gather(torch.stack(sums).tolist())
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]

    def _cause(self, samples: Sequence[Sample], lr: float) -> str:
        """Name the likely cause of a gradient that is not finite: weights, data or learning rate. Collective."""
        if not self.weights_are_finite():
            return "because weights of the policy are not finite; go on from the last checkpoint whose weights are"
        for cause in self.topology.all_gather(not_finite(samples)):
            if cause is not None:
                return f"because {cause}"
        remedy = "lower optimizer.lr and go on from the last checkpoint"
        return f"at learning rate {lr:g}, with finite weights and data; {remedy}"

    @property
    def resting(self) -> bool:
        """Whether gradients and optimizer state have left the device."""
        return self._memory.resting

    def rest(self) -> None:
        """Let them leave, until an update or a checkpoint needs them. On each rank for itself."""
        self._memory.rest()

    # ------------------------------------------------------------------------------------------ weights
    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(HF name, full tensor) on global rank 0, in a fixed order; other ranks exhaust an empty iterator."""
        assert self.slots.shows_policy, "engines must never get the reference's weights"
        yield from self.shown_weights()

    def shown_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The same of whichever slot is shown."""
        yield from self._leaving.whole()

    def weight_senders(self) -> list[int]:
        """The global rank that has each part of `weight_parts`; `[0]` where all are in one."""
        return self._leaving.senders

    def weight_parts(self) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """Yield for each part (HF name, full tensor) on its sender; other ranks exhaust an empty iterator."""
        assert self.slots.shows_policy, "engines must never get the reference's weights"
        yield from self._leaving.parts()

    def weights_in_step(self) -> Iterator[tuple[int, list[tuple[str, torch.Tensor]]]]:
        """Yield (sender, pairs) bucket by bucket, as often on every rank; the pairs are there on the sender."""
        assert self.slots.shows_policy, "engines must never get the reference's weights"
        yield from self._leaving.in_step()

    def restart_optimizer(self) -> None:
        """Masters from the present parameters, no moments, and a learning rate that warms up again."""
        with self._memory.with_state():
            restart_optimizer(self._optimizer)
        self._scheduler.num_steps = 0

    def save_weights(self, path: Path) -> None:
        """The parameters alone, sharded, into the existing empty folder `path`."""
        checkpoint.save_weights(path, self._chunks)

    def load_state(self, path: Path) -> None:
        """The parameters alone, from what `save_weights` or `save` wrote; the optimizer knows nothing of it."""
        checkpoint.load_weights(path, self._chunks)

    def save(self, path: Path) -> None:
        with self._memory.with_state():
            checkpoint.save_training_state(path, self._chunks, self._optimizer, self._scheduler, self.slots)

    def begin_save(self, path: Path) -> StateWriter:
        with self._memory.with_state():
            return checkpoint.begin_training_state(path, self._chunks, self._optimizer, self._scheduler, self.slots)

    def restore(self, path: Path, reference_is_policy: bool) -> None:
        parts = self._chunks, self._optimizer, self._scheduler, self.slots
        with self._memory.with_state():
            checkpoint.load_training_state(path, *parts, reference_is_policy)

    # ------------------------------------------------------------------------------------------ inside
    def _of_tokens(
        self, samples: Sequence[Sample], *names: str, statistic: Statistic | None = None
    ) -> list[list[torch.Tensor]]:
        """These fields of LogProbs, for each the response tokens' values [L] per sample."""
        plan = self._packs.plan(samples)
        _, microbatches = self._built(samples, plan)
        self._settle_head(microbatches)
        for chunk in self._chunks:
            chunk.eval()
        values = PassValues(self.topology, samples, len(names), homes_of(plan))
        for microbatch, found in forward_logprobs(self._chunks, microbatches, self.logp_mode, statistic):
            response_R, place_R = (rows.to(cpu.device()) for rows in microbatch.responses(values.starts))
            found_KR = torch.stack([getattr(found, name) for name in names])[:, response_R]
            values.flat_K[:, place_R] = found_KR.to(values.flat_K.dtype)
        return values.delivered()

    def _teaching(self, microbatches: list[Microbatch]) -> dict[int, TeacherRows]:
        for chunk in self._chunks:
            chunk.eval()
        with self.slots.showing_teacher():
            bare = [one.without_experts() for one in microbatches]
            found = forward_teacher(self._chunks, bare)
        return {id(one): found[id(other)] for one, other in zip(microbatches, bare, strict=True) if id(other) in found}

    def _settle_head(self, microbatches: list[Microbatch]) -> None:
        """Before the first pass in FP8: one look at its error on these tokens, and all ranks go on alike."""
        if self._head_settled:
            return
        for chunk in self._chunks:
            chunk.eval()
        found = self.topology.all_gather(forward_head_errors(self._chunks, microbatches))
        self.logp_mode = settled_mode([error for errors in found for error in errors], loud=self.topology.is_main)
        self._head_settled = True

    def _built(self, samples: Sequence[Sample], plan: Plan) -> tuple[list[Sample], list[Microbatch]]:
        """The samples with their tokens where the plan has them on this rank, and its microbatches."""
        here = self.fetch(samples, homes_of(plan))
        return here, self._packs.build(here, plan)


def choosing_themselves(samples: Sequence[Sample]) -> list[Sample]:
    """The samples without an engine's experts, for passes of other weights than those that it had."""
    return [sample if sample.experts is None else replace(sample, experts=None) for sample in samples]


def _end_the_run(cause: str) -> None:
    raise RunError(cause)


def _already_here(samples: Sequence[Sample], homes: Sequence[int]) -> list[Sample]:
    return list(samples)
