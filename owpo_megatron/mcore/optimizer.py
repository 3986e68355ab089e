"""Megatron's DDP and distributed optimizer over the policy's chunks, and the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from owpo_megatron.config import OptimizerConfig, Overlap
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.chunks import Chunks
from owpo_megatron.mcore.transformer import PolicyModel


@cpu.scoped
def wrap_ddp(chunks: list[PolicyModel], config: TransformerConfig, overlap: Overlap = "none") -> Chunks:
    """Wrap chunks in DDP: parameters become views into one contiguous buffer per dtype, as the slots require.

    Args:
        overlap: "gradients" reduces each bucket of gradients as soon as the last microbatch has all of them; "all" also
            lets the gather of parameters go on after a step.
    """
    late = overlap == "all"
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap != "none",
        overlap_param_gather=late,
        align_param_gather=late,  # modules wait and start nothing: all buckets are started at once, by `Chunks.start`
    )
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)
    ]
    if overlap != "none":  # the schedule enters it for all microbatches but the last
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return Chunks(wrapped, late)


@cpu.scoped
def make_optimizer(
    chunks: Sequence[DistributedDataParallel], config: OptimizerConfig, dtype: torch.dtype
) -> MegatronOptimizer:
    """Build AdamW with fp32 masters, sharded over data-parallel ranks. Call after loading the weights."""
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        list(chunks),
    )
    cpu.prime_adamw(optimizer)
    return optimizer


def make_scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig) -> OptimizerParamScheduler:
    """Learning rate per update: a line from 0 to `lr` over the warm-up, then the schedule that the config names."""
    updates = config.steps * config.updates_per_step
    decays = config.lr_schedule != "constant"
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr if decays else config.lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(updates, config.warmup_steps + 1),
        lr_decay_style={"wsd": "WSD"}.get(config.lr_schedule, config.lr_schedule),
        wsd_decay_steps=config.decay_steps * config.updates_per_step if config.lr_schedule == "wsd" else None,
        lr_wsd_decay_style="linear" if config.lr_schedule == "wsd" else None,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the config determines the learning rate, after a resume too
    )


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The global norm of the gradients, before anything is changed. Collective."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def step_with(optimizer: MegatronOptimizer, chunks: Chunks, grad_norm: float) -> None:
    """One step, with gradients clipped by their norm, which `gradient_norm` has found already. Collective.

    The chunks' parameters are whole afterwards, or will be when they are taken out.
    """
    chained = optimizer if hasattr(optimizer, "chained_optimizers") else None
    # With ep above 1 experts have an optimizer of their own, and each gathers everyone's parameters: the last one does.
    first = [(one, one.model_chunks) for one in distributed_optimizers(optimizer)[:-1]]
    for one, _ in first:
        one.model_chunks = []
    if chained is not None:
        chained.get_grad_norm = lambda: grad_norm  # megatron's step would compute it a second time
    try:
        optimizer.step()
    finally:
        for one, its_chunks in first:
            one.model_chunks = its_chunks
        if chained is not None:
            del chained.get_grad_norm
    chunks.start()


@torch.no_grad()
def restart_optimizer(optimizer: MegatronOptimizer) -> None:
    """Reset the optimizer: masters take the parameters' values, moments and step counts become zero."""
    optimizer.reload_model_params()
    for one in distributed_optimizers(optimizer):
        for state in one.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq", "step"):
                if name in state:
                    state[name].zero_()
        for group in one.param_groups:
            if "step" in group:  # FusedAdam's step count
                group["step"] = 0


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the DistributedOptimizer instances inside megatron's (possibly chained) optimizer."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
