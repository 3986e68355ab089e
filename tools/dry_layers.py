"""Kernels, host syncs and memory of the transformer layers, forward and backward, on a GPU that is not there.

    python tools/dry_layers.py [--model NAME ...] [--tp N ...] [--whole] [--json FILE]

One rank of a fake process group of 64 ranks, parameters and activations on the meta device (which autograd runs
through, as it does not through fake CUDA tensors), one packed microbatch of 16,384 tokens, bfloat16. The product's own
code builds the topology, layers and DDP, on its CUDA branch. Every operation on a meta tensor counts as a kernel,
unless it makes a view; every read of one as a wait of the host, with file and line; every storage as live bytes.
Layers are megatron-core's local ones with neither Transformer Engine nor apex; "fused" are the same with the fused
kernels of mcore/fusions.py, each of which counts as one kernel and keeps what the real one keeps. Attention and RMSNorm
count as one kernel each, as torch's on CUDA are; experts get equally many tokens. A stage's input is passed in, not
received. Stages of 3 and of 5 layers are run, and the model's are extrapolated, since every layer adds the same;
--whole runs all layers.

Not covered: Transformer Engine's own layers, which also fuse norms with products; the head (dry_table.py); time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dry_gpu import ROOT
from dry_meta import META, WORLD, DryLayers, Experts, machine

from owpo_megatron.config import Config, ParallelConfig
from owpo_megatron.families import HFModel, layers_of_stages, read_hf_config
from owpo_megatron.mcore.optimizer import wrap_ddp
from owpo_megatron.mcore.packing import Microbatch, build_microbatch
from owpo_megatron.mcore.spec import transformer_config
from owpo_megatron.mcore.topology import init_topology
from owpo_megatron.mcore.transformer import build_chunks
from owpo_megatron.plan.trainer import activation_bytes
from owpo_megatron.types import Sample

sys.path.insert(0, str(ROOT / "tests"))
from recipe_models import SHAPES  # noqa: E402

TOKENS, SEQUENCES = 16384, 4
SMALL = (3, 5)  # layers of a stage


@dataclass(frozen=True)
class Row:
    """Counts of one microbatch on one rank."""

    model: str
    tp: int
    pp: int
    ep: int
    stage: int
    fused: bool
    layers: int
    kernels: dict[str, int]  # by phase: "log-probs", "forward", "backward"
    syncs: dict[str, dict[str, int]]  # by phase: "what at file:line"
    collectives: int
    kept: int  # bytes that the forward leaves for the backward
    peak: int  # above weights and gradients, forward and backward
    planned: int  # activations of `owpo plan`, and local attention's copies, which Transformer Engine does not make


def row_of(name: str, hf: HFModel, parallel: ParallelConfig, stage: int = 0, fused: bool = False) -> Row:
    """Counts of one rank of a stage.

    Args:
        fused: with the fused kernels that Transformer Engine, apex and Triton would give.
    """
    parallel = _on_all_ranks(parallel)
    microbatch = _microbatch(parallel.tp)
    rows = TOKENS // parallel.tp
    experts = None
    if hf.experts:
        experts = Experts(rows * hf.experts.router.chosen, hf.num_experts, parallel.ep, parallel.tp)
    gpu = DryLayers(experts)
    with machine(gpu, rank=stage * (WORLD // parallel.pp), fused=fused):
        init_topology(parallel, 1)
        with META:
            config = transformer_config(hf, parallel, torch.bfloat16, {"perform_initialization": False})
            (chunk,) = wrap_ddp(build_chunks(hf, config, 1.0), config)
            given = None if chunk.module.pre_process else torch.empty(rows, 1, hf.hidden_size, dtype=torch.bfloat16)
            kernels, syncs = {}, {}
            gpu.start()
            with torch.no_grad():
                _forward(chunk, microbatch, given)
            kernels["log-probs"], syncs["log-probs"] = gpu.kernels.total(), dict(gpu.syncs)
            chunk.train()
            chunk.zero_grad_buffer()
            before = gpu.start()
            gpu.collectives = 0
            if given is not None:
                given.requires_grad_()
            hidden = _forward(chunk, microbatch, given)
            kernels["forward"], syncs["forward"] = gpu.kernels.total(), dict(gpu.syncs)
            kept, peak = gpu.live - before, gpu.peak
            gpu.start()
            hidden.backward(torch.empty_like(hidden))
            kernels["backward"], syncs["backward"] = gpu.kernels.total(), dict(gpu.syncs)
            peak = max(peak, gpu.peak) - before
    layers = len(chunk.module.decoder.layers)
    return Row(
        name, parallel.tp, parallel.pp, parallel.ep, stage, fused, layers, kernels, syncs, gpu.collectives, kept, peak,
        _planned(hf, parallel, stage),
    )  # fmt: skip


def _on_all_ranks(parallel: ParallelConfig) -> ParallelConfig:
    return parallel.model_copy(update={"dp": WORLD // (parallel.tp * parallel.pp), "sp": parallel.tp > 1})


def _forward(chunk: Any, microbatch: Microbatch, given: torch.Tensor | None) -> torch.Tensor:
    if given is not None:
        chunk.module.set_input_tensor([given])
    params = microbatch.packed_seq_params
    return chunk(microbatch.token_T, microbatch.position_T, None, packed_seq_params=params)


def _microbatch(tp: int) -> Microbatch:
    length = TOKENS // SEQUENCES
    sample = Sample((1,) * 1024, (2,) * (length - 1023), 1.0, True, (-1.0,) * (length - 1023))
    made = build_microbatch([sample] * SEQUENCES, range(SEQUENCES), tp, torch.device("cpu"), host_lengths=True)
    return replace(made, token_T=made.token_T.to(META), position_T=made.position_T.to(META))


def _planned(hf: HFModel, parallel: ParallelConfig, stage: int) -> int:
    config = Config.build({
        "model": {"path": "x", "dtype": "bfloat16"}, "data": {"source": "task:cipher", "max_prompt_tokens": 1024},
        "rollout": {"max_response_tokens": 1024}, "optimizer": {"tokens_per_microbatch": TOKENS},
        "parallel": parallel.model_dump(),
    })  # fmt: skip
    # padded queries, keys, values and results of the local attention (mcore/attention.py)
    copies = 2 * (hf.size("q") + hf.size("kv")) // parallel.tp * 2 * TOKENS
    ends = 4 * hf.hidden_size * 2 * TOKENS  # as activation_bytes has them once
    in_flight = parallel.pp - stage
    kept = (activation_bytes(config, hf, True, stage) - ends) // in_flight
    return kept + ends + copies * layers_of_stages(hf.num_layers, parallel.pp)[stage]


# ------------------------------------------------------------------------------------------ the command
EXPERTS = {  # config.json as published
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_act": "silu", "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 48, "num_key_value_heads": 4, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": False, "vocab_size": 151936, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}  # fmt: skip
CASES: list[tuple[str, dict[str, int], int]] = [  # model, layout, stage
    *(("qwen2.5-math-7b", {"tp": tp}, 0) for tp in (1, 4)),  # 28 heads: not 8
    *(("qwen3-8b-base", {"tp": tp}, 0) for tp in (1, 4, 8)),
    *(("qwen3-8b-base", {"tp": 4, "pp": 2}, stage) for stage in (0, 1)),
    *(("qwen3-30b-a3b", {"tp": tp, "ep": 8}, 0) for tp in (1, 4)),
]


def whole_row(name: str, parallel: ParallelConfig, stage: int, fused: bool, run_all: bool) -> Row:
    """Counts of a stage of the model, from those of two smaller ones unless all layers are to be run."""
    hf = model_of(name)
    if run_all:
        return row_of(name, hf, parallel, stage, fused)
    small, large = (
        row_of(name, replace(hf, num_layers=layers * parallel.pp), parallel, stage, fused) for layers in SMALL
    )
    layers = layers_of_stages(hf.num_layers, parallel.pp)[stage]
    steps = layers - small.layers

    def at(few: int, more: int) -> int:
        each, rest = divmod(more - few, large.layers - small.layers)
        assert not rest, "layers differ"
        return few + each * steps

    return replace(
        large,
        layers=layers,
        kernels={phase: at(few, large.kernels[phase]) for phase, few in small.kernels.items()},
        syncs={
            phase: {place: at(few.get(place, 0), more) for place, more in large.syncs[phase].items()}
            for phase, few in small.syncs.items()
        },
        collectives=at(small.collectives, large.collectives),
        kept=at(small.kept, large.kept),
        peak=at(small.peak, large.peak),
        planned=_planned(hf, _on_all_ranks(parallel), stage),
    )


def model_of(name: str) -> HFModel:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps((SHAPES | EXPERTS)[name]))
        return read_hf_config(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=list(SHAPES | EXPERTS), metavar="NAME")
    parser.add_argument("--tp", type=int, nargs="*", default=[1, 4, 8], help="tensor-parallel sizes")
    parser.add_argument("--whole", action="store_true", help="run all layers, ten times as long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    given = parser.parse_args()
    print("| model | tp | pp, stage | ep | layers | fused | kernels: log-probs | forward | backward | waits | "
          "collectives | kept GiB | peak GiB | plan |")  # fmt: skip
    print("|-|-|-|-|-|-|-|-|-|-|-|-|-|-|")
    rows = []
    for name, layout, stage in CASES:
        for fused in (False, True) if name in given.model and layout["tp"] in given.tp else ():
            row = whole_row(name, ParallelConfig(**layout), stage, fused, given.whole)
            rows.append(row)
            waits = sum(sum(row.syncs[phase].values()) for phase in ("forward", "backward"))
            sizes = " | ".join(f"{size / 2**30:.2f}" for size in (row.kept, row.peak, row.planned))
            kernels = " | ".join(map(str, row.kernels.values()))
            where = f"{row.pp}, {row.stage}" if row.pp > 1 else "1"
            fused_now = "yes" if fused else "no"
            print(f"| {name} | {row.tp} | {where} | {row.ep} | {row.layers} | {fused_now} | {kernels} | {waits} | "
                  f"{row.collectives} | {sizes} |", flush=True)  # fmt: skip
            if given.json:
                given.json.write_text(json.dumps([asdict(one) for one in rows], indent=1))


if __name__ == "__main__":
    main()
