"""Every collective of a step on hundreds of ranks, one rank at a time in one process, without their memory.

Ranks join torch's fake process group, parameters and activations are on the meta device, and the product's own code
builds the topology, computes log-probs, makes an update, gathers the weights on rank 0, as an export does, and where
they are, as a push does. `Recorder` notes each operation with its bytes and the members of its group. `differences`
compares ranks of a group: all of them must do the same operations in the same order, and what one sends another
receives. A rank that leaves one out is a run that hangs.

What other ranks would have sent comes from one place, `Recorder.answers` and `_fill`: gathered objects, shapes that a
stage receives; experts are chosen evenly. Not covered: values, time, Transformer Engine's layers (whose tensor-parallel
collectives are megatron-core's as well; context-parallel attention exchanges keys and values in its own way), NCCL.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.fx.experimental._config
from fake_calls import RankRecord
from fake_group import joined
from fake_recorder import Adapted, Recorder, StopExport
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter

from owpo_megatron.config import Config, ParallelConfig
from owpo_megatron.families import HFModel
from owpo_megatron.mcore.topology import Topology, init_topology
from owpo_megatron.methods import make_method
from owpo_megatron.policy import MegatronPolicy
from owpo_megatron.types import Sample

_EXPERT = re.compile(r"(?<=local_experts)\.(\d+)\.")


def _even_routing(self: Any, logits: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every expert as many of a rank's tokens as every other."""
    scores_TE = logits.view(-1, logits.shape[-1]).softmax(-1)
    tokens, experts = scores_TE.shape
    place_TK = torch.arange(tokens * self.topk).view(tokens, self.topk) % experts
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool, device="cpu").scatter(1, place_TK, True)
    return scores_TE * chosen_TE, chosen_TE


def record(
    config: Config,
    hf: HFModel,
    rank: int,
    microbatches: int = 2,
    catalogues: dict[tuple[int, int], Any] | None = None,
    update: bool = True,
) -> RankRecord:
    """Build one rank's part, compute log-probs, make an update and, where `catalogues` has them, export the weights.

    Args:
        microbatches: number per data-parallel rank, each with one sample of `optimizer.tokens_per_microbatch` tokens.
        catalogues: parameters of (stage, expert-parallel rank), as `all_catalogues` finds them.
        update: False: only the parameters are listed.
    """
    par = config.parallel
    tokens = config.optimizer.tokens_per_microbatch
    samples = [_sample(tokens)] * (microbatches * par.dp)
    shape = [tokens // par.cp // (par.tp if par.sp else 1), 1, hf.hidden_size]
    begin = time.process_time()
    with contextlib.ExitStack() as stack:
        stack.enter_context(joined(rank, par.world_size))
        recorder = Recorder(shape, catalogues, par)
        patch = mock.patch.object
        stack.enter_context(patch(Topology, "all_gather", lambda self, value: recorder.answers(value)))
        stack.enter_context(patch(Topology, "broadcast", lambda self, value: recorder.answers(value)[0]))
        stack.enter_context(patch(dist, "all_gather_object", recorder.gather_objects))
        stack.enter_context(patch(TopKRouter, "routing", _even_routing))
        stack.enter_context(patch(MegatronPolicy, "load_weights", lambda self, path: None))
        stack.enter_context(patch(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True))
        stack.enter_context(Adapted())
        stack.enter_context(recorder)
        topology = init_topology(par, config.seed)
        with torch.device("meta"):
            policy = MegatronPolicy(
                config.model, par, config.optimizer, config.reference, hf, topology,
                config.rollout.temperature, config.megatron,
            )  # fmt: skip
        if update:
            recorder.phase = "log-probs"
            policy.logprobs(samples)
            recorder.phase = "update"
            policy.update(samples, make_method(config.algorithm))
        recorder.phase = "export"
        memory = _memory(policy)
        with contextlib.suppress(StopExport):
            deque(policy.named_weights(), maxlen=0)
            recorder.phase = "weights"
            for part in policy.weight_parts():
                deque(part, maxlen=0)
        place = {
            "tp": topology.tp_rank, "cp": topology.context.rank, "pp": topology.pp_rank, "dp": topology.dp_rank,
            "ep": topology.ep_rank,
        }  # fmt: skip
        groups = _groups(topology)
    seconds = time.process_time() - begin
    return RankRecord(rank, place, recorder.calls, memory, groups, recorder.catalogue, seconds)


def all_catalogues(config: Config, hf: HFModel) -> dict[tuple[int, int], Any]:
    """Parameters of every (stage, expert-parallel rank): in a stage they differ in their experts' numbers alone."""
    par, found = config.parallel, {}
    for stage in range(par.pp):
        first = record(config, hf, stage * (par.world_size // par.pp), update=False).catalogue
        for ep in range(par.ep):
            more = ep * hf.num_experts // par.ep
            found[stage, ep] = (stage, ep, [(_renumbered(name, more), *of) for name, *of in first[2]])
    return found


def _renumbered(name: str, more: int) -> str:
    return _EXPERT.sub(lambda found: f".{int(found[1]) + more}.", name)


def _groups(topology: Topology) -> dict[tuple[int, ...], str]:
    groups = {
        "all ranks": dist.group.WORLD,
        "embeddings": parallel_state.get_embedding_group(check_initialized=False),
        "pipeline": topology.pp_group,
        "experts' copies": parallel_state.get_expert_data_parallel_group(),
        "experts": parallel_state.get_expert_tensor_and_model_parallel_group(),
        "same parameters": topology.copies_group,
        "context": topology.context.group,
        "tensor": topology.tp_group,
    }
    return {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items() if group}


def _sample(tokens: int) -> Sample:
    logp = torch.full((tokens // 2,), -1.0)
    return Sample(
        prompt_ids=(1,) * (tokens - tokens // 2),
        response_ids=(2,) * (tokens // 2),
        advantage=1.0,
        active=True,
        behaviour_logp=tuple(logp.tolist()),
        old_logp=logp,
        ref_logp=logp,
    )


def _memory(policy: MegatronPolicy) -> dict[str, int]:
    """Bytes of this rank's buffers after an update, as `owpo plan` counts them."""
    buffers = [b for chunk in policy._chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    states = [one.optimizer for one in getattr(policy._optimizer, "chained_optimizers", [policy._optimizer])]
    kept = {id(tensor): tensor for one in states for state in one.state.values() for tensor in state.values()}
    masters = [
        param for one in states for group in one.param_groups for param in group["params"]
    ] if policy._optimizer.config.bf16 else []  # fmt: skip
    moments = [tensor for tensor in kept.values() if isinstance(tensor, torch.Tensor) and tensor.dim()]
    return {
        "weights": sum(b.param_data.numel() * b.param_data.element_size() for b in buffers),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *masters]),
    }


def representatives(parallel: ParallelConfig, copies: int = 2) -> list[int]:
    """Ranks of every place in tp, cp and pp, and so in ep, at the first data-parallel indices."""
    per_stage = parallel.world_size // parallel.pp
    return [
        stage * per_stage + rank
        for stage in range(parallel.pp)
        for rank in range(parallel.tp * parallel.cp * min(copies, parallel.dp))
    ]
