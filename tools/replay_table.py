"""Mismatch of trainer and engine with and without `rollout.routing_replay`, on a CPU.

    python tools/replay_table.py [--responses N] [--tokens L] [--json FILE]

A real SGLang server and the trainer have the same weights: a random mixture of 6 layers, 16 experts, 4 chosen. The
engine draws responses and returns the experts that it chose. The trainer computes their log-probs with the choice of
its own routers ("own"), or with the engine's ("replayed"). Trainer and engine are in float32 or bfloat16. Flips are the
share of (token, layer) in which the trainer's own routers choose another set of experts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import build_policy, make_config, make_hf_model  # noqa: E402

from owpo_megatron.config import EngineConfig, SyncConfig  # noqa: E402
from owpo_megatron.engine import start_fleet  # noqa: E402
from owpo_megatron.engine.command import find_python  # noqa: E402
from owpo_megatron.families import EngineLayout, expert_shape  # noqa: E402
from owpo_megatron.mcore.router import GivenChoice  # noqa: E402
from owpo_megatron.policy.policy import choosing_themselves  # noqa: E402
from owpo_megatron.sync import make_sync  # noqa: E402
from owpo_megatron.types import Prompt, Rollout, Sample, SampleRequest, Sampling  # noqa: E402

MODEL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32,
    "norm_topk_prob": True, "max_position_embeddings": 1024, "eos_token_id": 2,
}  # fmt: skip
CASES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))  # of trainer and engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    given = parser.parse_args()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    rows = []
    print("| trainer | engine | tokens | flips | own: mean gap | largest | replayed: mean gap | largest |")
    print("|-|-|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        hf = make_hf_model(Path(folder) / "hf", "qwen3_moe", **MODEL)
        for trainer, engine in CASES:
            row = row_of(hf, Path(folder), trainer, engine, given.responses, given.tokens)
            rows.append(row)
            print(
                "| " + " | ".join(f"{one:.2g}" if isinstance(one, float) else str(one) for one in row.values()) + " |"
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


def row_of(hf: Path, folder: Path, trainer: str, engine: str, responses: int, tokens: int) -> dict[str, Any]:
    """One line of the table."""
    config = make_config(hf, model={"dtype": trainer}, optimizer={"tokens_per_microbatch": 4096})
    policy = build_policy(config)
    server = EngineConfig(device="cpu", max_restarts=0, request_timeout=3000)
    assert find_python(server).exists()
    raw = {"load_format": "dummy", "enable_return_routed_experts": True}
    with start_fleet(server, hf, engine, raw, folder / f"logs-{trainer}-{engine}") as fleet:
        layout = EngineLayout.of(policy.hf)
        with closing(make_sync(SyncConfig(), fleet.clients, folder / "sync", layout)) as sync:
            sync.push(policy.named_weights(), 1)
        fleet.ask_for_experts(expert_shape(policy.hf))
        requests = [SampleRequest(Prompt(str(i), (5, 9, 40 + i, 17), "", ""), seed=i) for i in range(responses)]
        rollouts = list(fleet.generate(requests, Sampling(tokens, experts=True)))
    samples = [_sample(one) for one in rollouts]
    told = torch.cat([torch.tensor(one.behaviour_logp.tolist()) for one in samples])
    with noted() as chosen:
        own = torch.cat(policy.logprobs(choosing_themselves(samples)))
    replayed = torch.cat(policy.logprobs(samples))
    row: dict[str, Any] = {"trainer": trainer, "engine": engine, "tokens": len(told), "flips": flips(chosen, samples)}
    for name, found in (("own", own), ("replayed", replayed)):
        gap = (found - told).abs()
        row |= {f"{name} mean": float(gap.mean()), f"{name} largest": float(gap.max())}
    return row


def _sample(rollout: Rollout) -> Sample:
    ids = tuple(rollout.prompt.token_ids)
    return Sample(ids, rollout.response_ids, 0.0, True, rollout.behaviour_logp, experts=rollout.experts)


@contextmanager
def noted() -> Iterator[list[torch.Tensor]]:
    """The experts that routers choose meanwhile, [T, topk] for each layer of each pack."""
    found: list[torch.Tensor] = []
    original = GivenChoice.get_replay_topk

    def choose(self: GivenChoice, *args: Any, **kwargs: Any) -> Any:
        scores, index_TK = original(self, *args, **kwargs)
        found.append(index_TK)
        return scores, index_TK

    GivenChoice.get_replay_topk = choose  # type: ignore[method-assign]
    try:
        yield found
    finally:
        GivenChoice.get_replay_topk = original  # type: ignore[method-assign]


def flips(chosen: list[torch.Tensor], samples: list[Sample]) -> float:
    """Share of (token, layer) with another set of experts than the engine's; for one pack of all samples, longest
    first."""
    order = sorted(samples, key=lambda one: -len(one.response_ids))
    told_TLK = torch.cat([one.experts.tensor().long() for one in order if one.experts is not None])
    assert len(chosen) == told_TLK.shape[1], "more than one pack"
    own_TLK = torch.stack(chosen, 1)[: len(told_TLK)]
    return float((own_TLK.sort(-1).values != told_TLK.sort(-1).values).any(-1).float().mean())


if __name__ == "__main__":
    main()
