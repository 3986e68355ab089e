"""Three OWPO updates at many parallel layouts against the dense oracle (dense.py: transformers, autograd, torch AdamW).

Covered: log-probs, loss, gradient norm (before clipping, which acts), every parameter after three updates with warm-up;
tied and untied embeddings, a vocabulary that needs padding, non-uniform advantages, samples that are not active, one
that is masked, unequal packed lengths, a minibatch of one sample (empty microbatches on the other data-parallel rank);
experts at ep 1, 2 and 4, split and (etp 1) whole; context parallelism alone and with tp, pp, vpp and ep; recomputed
activations.
Not covered: bfloat16, CUDA, Transformer Engine's layers, tp > 2, experts that ranks share at ep > 1, several processes
over a network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import train_dense
from parity_worker import batches, distance, distances
from rank_pool import Ranks
from tiny import make_hf_model

from owpo_megatron.conversion.export import hf_to_megatron

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"tied": False},
    "qwen2": {"tied": True, "vocab_size": 97},
    "llama": {"tied": True, "vocab_size": 101},
    "mistral": {"tied": False},
    "qwen3_moe": {"norm_topk_prob": True},
}
TWO_RANKS: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "sp": True},
    {"dp": 2},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
]
MORE: list[dict[str, Any]] = [
    {"cp": 2},
    {"dp": 2, "overlap": True},
    {"tp": 2, "sp": True, "recompute": "full"},
    {"pp": 2, "recompute": "selective"},
]
EXPERTS_ON_TWO_RANKS: list[dict[str, Any]] = [
    {"dp": 2, "ep": 2},
    {"cp": 2, "ep": 2},
    {"dp": 2},
    {"pp": 2},
    {"tp": 2, "sp": True},
    {"tp": 2, "sp": True, "etp": 1, "ep": 2},
]
FOUR_RANKS: dict[str, list[dict[str, Any]]] = {
    "qwen3": [
        {"tp": 2, "pp": 2, "sp": True},
        {"tp": 2, "dp": 2},
        {"cp": 2, "tp": 2, "sp": True},
        {"cp": 2, "pp": 2},
    ],
    "qwen2": [{"tp": 2, "pp": 2, "vpp": 2}, {"pp": 2, "dp": 2}, {"cp": 2, "pp": 2, "vpp": 2}],
    "qwen3_moe": [
        {"pp": 2, "dp": 2, "ep": 2, "overlap": True},
        {"tp": 2, "sp": True, "dp": 2, "etp": 1, "ep": 2},
        {"tp": 2, "sp": True, "dp": 2, "etp": 1, "ep": 4},
    ],
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """family -> (HF folder, file with the oracle's results)."""
    root = tmp_path_factory.mktemp("parity")
    found = {}
    for family, fields in FAMILIES.items():
        model = make_hf_model(root / family, family, **fields)
        oracle = train_dense(model, batches(), lr=1e-3, warmup=2)
        torch.save(oracle, root / f"{family}.pt")
        found[family] = (model, root / f"{family}.pt")
    return found


def check(found: dict[str, Any]) -> None:
    print(found)  # figures for a reader: pytest -s
    errors = {name: found[name] for name in ("logp", "loss", "grad_norm", "weights")}
    assert max(errors.values()) < TOLERANCE, errors
    assert found["names"], "named_weights and the HF model name different tensors"
    assert found["moved"] > 100 * TOLERANCE, "the updates changed too little for a comparison"


def cases_of(layouts: dict[str, list[dict[str, Any]]], oracles: dict[str, tuple[Path, Path]]) -> list[dict[str, Any]]:
    return [
        {"model": str(oracles[family][0]), "oracle": str(oracles[family][1]), "layouts": chosen}
        for family, chosen in layouts.items()
    ]


@pytest.mark.parametrize("tokens", [12, 24, 10_000])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_one_rank(family: str, tokens: int, oracles: dict[str, tuple[Path, Path]]) -> None:
    """Also: the result does not depend on how samples are split into microbatches."""
    model, oracle = oracles[family]
    check(distance(model, torch.load(oracle), {"tokens_per_microbatch": tokens})[1])


def test_two_ranks(ranks: Ranks, oracles: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Also from a converted megatron folder, whose vocabulary is padded for one rank, not for two."""
    model, oracle = oracles["qwen2"]
    hf_to_megatron(model, tmp_path / "megatron")
    layouts = {family: EXPERTS_ON_TWO_RANKS if family == "qwen3_moe" else TWO_RANKS for family in FAMILIES}
    cases = cases_of(layouts | {"qwen3": TWO_RANKS + MORE}, oracles)
    cases.append({"model": str(tmp_path / "megatron"), "oracle": str(oracle), "layouts": [{"tp": 2}, {"pp": 2}]})
    results = ranks.run(2, distances, cases)[0]
    assert len(results) == sum(len(case["layouts"]) for case in cases)
    for found in results:
        check(found)


def test_four_ranks(ranks: Ranks, oracles: dict[str, tuple[Path, Path]]) -> None:
    results = ranks.run(4, distances, cases_of(FOUR_RANKS, oracles))[0]
    assert len(results) == sum(map(len, FOUR_RANKS.values()))
    for found in results:
        check(found)


def test_stages_of_different_sizes(ranks: Ranks, tmp_path: Path) -> None:
    """Seven layers on two stages (4 and 3) and on four (2, 2, 2 and 1), from HF's files and from a converted folder."""
    model = make_hf_model(tmp_path / "hf", "qwen3", num_hidden_layers=7)
    hf_to_megatron(model, tmp_path / "megatron")
    torch.save(train_dense(model, batches(), lr=1e-3, warmup=2), tmp_path / "oracle.pt")
    case = {"model": str(model), "oracle": str(tmp_path / "oracle.pt")}
    found = ranks.run(2, distances, [case | {"layouts": [{"pp": 2}]}])[0]
    found += ranks.run(4, distances, [case | {"model": str(tmp_path / "megatron"), "layouts": [{"pp": 4}]}])[0]
    assert len(found) == 2
    for one in found:
        check(one)
