"""Trainer and engine together: does a run fit on GPUs of this size?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.engine.context import check_context_length
from owpo_megatron.families import HFModel, check_context, check_parallel, expert_shape, read_hf_config
from owpo_megatron.launch.job import EnginePlace, Job
from owpo_megatron.mcore.context import check_context_attention
from owpo_megatron.mcore.spec import transformer_config
from owpo_megatron.methods import make_method
from owpo_megatron.plan.engine import EngineMemory, engine_memory
from owpo_megatron.plan.parameters import whole_model
from owpo_megatron.plan.trainer import TrainerMemory, trainer_memory

OVERHEAD = 3 << 29  # 1.5 GiB: CUDA context, NCCL, cuBLAS workspaces, fragmentation. A guess
CONTEXT = 1 << 29  # of a process on another GPU that opens memory of this one. A guess
RECOMPUTE = "parallel.recompute=full"
"""Override that recomputes every layer's activations."""


@dataclass(frozen=True)
class Plan:
    """Bytes on each GPU; `trainer` is the fullest pipeline stage."""

    parameters: int  # of the model
    gpu: int
    trainer: TrainerMemory
    stages: tuple[TrainerMemory, ...]
    engine: EngineMemory | None  # None: rollouts are replayed, or the engines are someone else's
    engine_place: EnginePlace
    full_length: int  # prompt and response, both as long as allowed, in tokens
    recomputes: bool = False  # all activations are recomputed already
    contexts: int = 0  # on global rank 0's GPU: those of engines on other GPUs, which copy weights from it
    in_turn: bool = False  # trainer and engine do not have their memory at the same time (engine.in_turn)

    @property
    def trainer_total(self) -> int:
        return self.trainer.total + OVERHEAD

    @property
    def used(self) -> int:
        """Memory used on the fullest GPU of the trainer, an engine that shares it included."""
        if self.engine_place != "trainer's nodes" or self.engine is None:
            return self.trainer_total
        if not self.in_turn:
            return self.trainer_total + self.engine.static + self.contexts
        trainer = self.trainer
        # whichever side works has what it needs; both processes stay, each with an overhead of its own
        generating = trainer.weights + trainer.reference + self.engine.static + OVERHEAD
        pushing = trainer.weights + trainer.reference + trainer.sync + self.engine.weights + OVERHEAD
        saving = trainer.lasting + trainer.optimizer - trainer.optimizer_at_rest + self.engine.weights + OVERHEAD
        return max(self.trainer_total, generating, pushing, saving) + OVERHEAD + self.contexts

    @property
    def free(self) -> int:
        return self.gpu - self.used

    @property
    def problem(self) -> str | None:
        """Why it does not fit, with what helps; None: it does."""
        if self.free < 0:
            remedies = [
                "raise parallel.tp or the number of ranks",
                *([] if self.recomputes else [f"recompute activations ({RECOMPUTE})"]),
                "lower optimizer.tokens_per_microbatch or sglang.mem_fraction_static",
                "set reference.placement=offloaded",
                *(["set optimizer.offload=true"] if self.trainer.optimizer_at_rest else []),
                *([] if self.in_turn else ["let trainer and engines have the memory in turn (engine.in_turn)"]),
                "give the engines nodes of their own",
            ]
            return f"the trainer's GPUs lack {-self.free / 2**30:.1f} GiB: {', or '.join(remedies)}"
        if self.engine is not None and self.engine.tokens < self.full_length:
            return (
                f"the engine's cache holds {self.engine.tokens} tokens, not one response of full length "
                f"({self.full_length}): raise sglang.mem_fraction_static or engine.tp"
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain keys; bytes, unless the name gives another unit."""
        engine = asdict(self.engine) | {"tokens": self.engine.tokens} if self.engine else None
        return {
            "parameters_of_the_model": self.parameters,
            "gpu": self.gpu,
            "trainer": asdict(self.trainer) | {"overhead": OVERHEAD, "total": self.trainer_total},
            "stages": [asdict(stage) | {"total": stage.total + OVERHEAD} for stage in self.stages],
            "engine": engine,
            "engine_place": self.engine_place,
            "contexts": self.contexts,
            "used": self.used,
            "free": self.free,
            "full_length_tokens": self.full_length,
            "fits": self.problem is None,
            "problem": self.problem,
        }


def make_plan(config: Config, gpu_bytes: int, model: HFModel | None = None, cuda: bool = True) -> Plan:
    """The memory of a run, from its configuration and the model's config.json alone; nothing is loaded.

    Raises:
        UserError: the trainer would refuse the configuration: the model is missing or unsupported, the parallel sizes
            do not divide it, its context is too short, or megatron-core refuses the `megatron:` block.
    """
    if model is None:
        model = read_hf_config(hf_folder(config.model.path))
        check_context_length(config)
    check_parallel(model, config.parallel)
    if config.rollout.routing_replay:
        expert_shape(model)
    full_length = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    check_context(model, full_length)
    transformer_config(model, config.parallel, getattr(torch, config.model.dtype), config.megatron)
    if cuda:
        par = config.parallel
        check_context_attention(model, par.cp, par.tp, config.megatron.get("cp_comm_type"))
    method = make_method(config.algorithm)
    stages = tuple(trainer_memory(config, model, cuda, method.needs_reference))
    job = Job(config, workdir=config.runs_dir)
    place = job.engine_place
    engine = None if place == "none" else engine_memory(config, model, gpu_bytes)
    fullest = max(stages, key=lambda stage: stage.total)
    recomputes = config.recomputation.get("recompute_granularity") == "full"
    shared = place == "trainer's nodes" and config.sync.transport == "ipc"
    contexts = (job.engines_per_node * config.engine.tp - 1) * CONTEXT if shared else 0
    turns = config.engine.in_turn
    sizes = whole_model(model), gpu_bytes
    return Plan(*sizes, fullest, stages, engine, place, full_length, recomputes, contexts, turns)
