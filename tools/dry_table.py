"""Kernels, host syncs and memory of the training head at the recipes' shapes, counted on a GPU that is not there.

    PYTHONPATH=.venv/triton python tools/dry_table.py [--json FILE]

One microbatch of 16,384 tokens on rank 0 of a tensor-parallel group (torch's fake process group), OWPO, bfloat16,
`main_grad` in float32 (dry_gpu.py lists what a dry run leaves out). "plan" is what `owpo plan` reserves for the head.
Needs Triton for its launchers (`make test-extra` installs it).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from dry_gpu import ROOT, DryGpu, count_triton
from torch.testing._internal.distributed.fake_pg import FakeStore

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel, padded_vocab_size, read_hf_config
from owpo_megatron.head import Head, VocabShard
from owpo_megatron.methods import make_method
from owpo_megatron.plan.trainer import head_bytes
from owpo_megatron.types import LogpMode, TokenBatch

sys.path.insert(0, str(ROOT / "tests"))
from recipe_models import SHAPES  # noqa: E402

TOKENS = 16384
MODES: tuple[LogpMode, ...] = ("exact", "fp8_refined")


@dataclass(frozen=True)
class Row:
    """Counts of one microbatch."""

    model: str
    tp: int
    mode: str
    what: str  # "loss" with its gradients, or "log-probs"
    kernels: int
    syncs: dict[str, int]  # "what at file:line"
    extra: int  # bytes above inputs, weight and main_grad, at the worst moment
    planned: int


def rows_of(name: str, tp: int) -> list[Row]:
    model = _model(name)
    store = FakeStore()
    dist.init_process_group("fake", rank=0, world_size=tp, store=store)
    try:
        return [_row(name, model, tp, mode, what) for mode in MODES for what in ("loss", "log-probs")]
    finally:
        dist.destroy_process_group()


def _row(name: str, model: HFModel, tp: int, mode: LogpMode, what: str) -> Row:
    vocab = padded_vocab_size(model.vocab_size, tp) // tp
    with DryGpu() as gpu:
        count_triton(gpu)
        h_TH = torch.empty(TOKENS, model.hidden_size, dtype=torch.bfloat16, device="cuda").requires_grad_()
        weight_VH = torch.empty(vocab, model.hidden_size, dtype=torch.bfloat16, device="cuda").requires_grad_()
        weight_VH.main_grad = torch.zeros(vocab, model.hidden_size, device="cuda")
        batch, target_T = _batch(mode), torch.zeros(TOKENS, dtype=torch.int64, device="cuda")
        head = Head(weight_VH, shard=VocabShard(vocab, model.vocab_size, dist.group.WORLD if tp > 1 else None))
        before = gpu.start()
        if what == "loss":
            out: object = head.loss(h_TH, target_T, batch, make_method("owpo"), mode)
        else:
            out = head.logprobs(h_TH, target_T, batch.row_mask_T, mode)
        row = Row(
            name, tp, mode, what, gpu.kernels.total(), dict(gpu.syncs), gpu.peak - before, _planned(model, tp, mode)
        )
        del out
        return row


def _batch(mode: LogpMode) -> TokenBatch:
    def floats() -> torch.Tensor:
        return torch.zeros(TOKENS, device="cuda")

    def flags() -> torch.Tensor:
        return torch.ones(TOKENS, dtype=torch.bool, device="cuda")

    return TokenBatch(
        old_logp_T=floats(), ref_logp_T=floats(), advantage_T=floats(), active_T=flags(), mask_T=flags(),
        row_mask_T=flags(), sample_T=torch.zeros(TOKENS, dtype=torch.int64, device="cuda"), num_samples=4,
        old_mode=mode, ref_mode=mode,
    )  # fmt: skip


def _model(name: str) -> HFModel:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[name]))
        return read_hf_config(Path(folder))


def _planned(model: HFModel, tp: int, mode: LogpMode) -> int:
    config = Config.build(
        {
            "model": {"path": "model", "dtype": "bfloat16", "head": mode},
            "data": {"source": "task:cipher"},
            "parallel": {"tp": tp},
            "optimizer": {"tokens_per_microbatch": TOKENS},
        }
    )
    return head_bytes(config, model, cuda=True, weight=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--tp", type=int, nargs="*", default=[1, 4, 8], help="tensor-parallel sizes")
    given = parser.parse_args()
    print("| model | tp | head | pass | kernels | host syncs | extra GiB | plan |\n|-|-|-|-|-|-|-|-|")
    rows = []
    for name in SHAPES:
        for tp in given.tp:
            for row in rows_of(name, tp):
                rows.append(row)
                sizes = f"{row.extra / 2**30:.2f} | {row.planned / 2**30:.2f}"
                cells = f"{row.kernels} | {sum(row.syncs.values())} | {sizes}"
                print(f"| {name} | {tp} | {row.mode} | {row.what} | {cells} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
