"""Experts that come with the samples: the router takes them, and gradients go through its own probabilities of them.

Covered: three updates with random experts against the dense oracle, on one rank and on two (tp, pp, vpp, cp, ep, whole
experts, recomputation); replaying a router's own choice changes no bit, in every family with experts; what is refused.
Not covered: CUDA, Transformer Engine's permutation; experts of a real engine (tests/engine/test_routed_experts.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from family_cases import CASES
from parity_worker import batches, distance, distances, with_experts
from rank_pool import Ranks
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.errors import RunError, UserError
from owpo_megatron.families import expert_shape, read_hf_config
from owpo_megatron.mcore.packing import build_microbatch
from owpo_megatron.mcore.router import GivenChoice
from owpo_megatron.methods import make_method
from owpo_megatron.policy.policy import choosing_themselves
from owpo_megatron.types import RoutedExperts, Sample

TWO_RANKS: list[dict[str, Any]] = [
    {"tp": 2, "sp": True},
    {"pp": 2, "recompute": "full"},
    {"pp": 2, "vpp": 2},
    {"dp": 2, "ep": 2},
    {"cp": 2},
    {"tp": 2, "sp": True, "etp": 1, "ep": 2},
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(HF folder, file with the results of an oracle whose routers are given their experts)."""
    root = tmp_path_factory.mktemp("replay")
    model = make_hf_model(root / "hf", "qwen3_moe", norm_topk_prob=True)
    current: list[Sample] = []
    original = dense.sequence_logp

    def sequence_logp(network: torch.nn.Module, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
        current[:] = [sample]
        return original(network, sample, temperature)

    def forward(gate: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The router of transformers with the sample's experts, and any for its last token, which is only a target."""
        (sample,) = current
        assert sample.experts is not None
        shares = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight).softmax(-1)
        index_TK = torch.cat([sample.experts.tensor()[:, gate.number].long(), torch.tensor([[0, 1]])])
        chosen = shares.gather(1, index_TK)
        return shares, chosen / chosen.sum(-1, keepdim=True), index_TK

    from transformers.models.qwen3_moe import modeling_qwen3_moe

    load = dense.AutoModelForCausalLM.from_pretrained

    def numbered(*args: Any, **kwargs: Any) -> Any:
        network = load(*args, **kwargs)
        for number, layer in enumerate(network.model.layers):
            layer.mlp.gate.number = number
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "sequence_logp", sequence_logp)
        patch.setattr(dense.AutoModelForCausalLM, "from_pretrained", numbered)
        patch.setattr(modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", forward)
        oracle = dense.train_dense(model, [with_experts(samples) for samples in batches()], lr=1e-3, warmup=2)
    torch.save(oracle, root / "oracle.pt")
    return model, root / "oracle.pt"


def check(found: dict[str, Any]) -> None:
    errors = {name: found[name] for name in ("logp", "loss", "grad_norm", "weights")}
    assert max(errors.values()) < TOLERANCE, (found["layout"], errors)
    assert found["moved"] > 100 * TOLERANCE


@pytest.mark.parametrize("tokens", [12, 10_000])
def test_told_experts_on_one_rank(tokens: int, told: tuple[Path, Path]) -> None:
    model, oracle = told
    layout = {"replay": True, "tokens_per_microbatch": tokens}
    check(distance(model, torch.load(oracle), layout)[1] | {"layout": layout})
    own = distance(model, torch.load(oracle), {})[1]
    assert own["logp"] > 0.01, "the routers would have chosen the same"


def test_told_experts_on_two_ranks(ranks: Ranks, told: tuple[Path, Path]) -> None:
    layouts = [{"replay": True} | layout for layout in TWO_RANKS]
    for found in ranks.run(2, distances, [{"model": str(told[0]), "oracle": str(told[1]), "layouts": layouts}])[0]:
        check(found)


MIXTURES = ["qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "qwen3_next"]


@pytest.mark.parametrize("family", MIXTURES)
def test_replaying_the_routers_own_choice_changes_no_bit(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers without experts, groups, sigmoid scores with a bias: gradient norm and log-probs to the last bit."""
    shapes = CASES.get(family, [{}])
    shape = shapes[2] if family in ("glm4_moe", "deepseek_v2") else shapes[0]  # with groups
    policy = build_policy(make_config(make_hf_model(tmp_path / "hf", family, **shape)))
    found: list[torch.Tensor] = []
    original = GivenChoice.get_replay_topk

    def noting(self: GivenChoice, *args: Any, **kwargs: Any) -> Any:
        scores, index_TK = original(self, *args, **kwargs)
        found.append(index_TK)
        return scores, index_TK

    (sample,) = random_samples(3, count=1, vocab_size=90)
    with monkeypatch.context() as patch:
        patch.setattr(GivenChoice, "get_replay_topk", noting)
        (logp,) = policy.logprobs([sample])
    layout = expert_shape(policy.hf)
    assert len(found) == len(layout.layers)
    tokens = len(sample.prompt_ids) + len(sample.response_ids) - 1
    expert_TLK = torch.stack(found, 1)[:tokens]
    told = replace(sample, experts=RoutedExperts.of(expert_TLK.numpy(), layout.number))
    assert torch.equal(policy.logprobs([told])[0], logp)
    other = replace(sample, experts=RoutedExperts.of((expert_TLK.numpy() + 1) % layout.number, layout.number))
    assert not torch.equal(policy.logprobs([other])[0], logp)
    assert torch.equal(policy.logprobs(choosing_themselves([other]))[0], logp), "the reference chooses for itself"
    again = build_policy(make_config(tmp_path / "hf"))
    method = make_method("grpo")
    first, second = policy.update([sample], method), again.update([told], method)
    assert first["grad_norm"] == second["grad_norm"] and first["loss_sum"] == second["loss_sum"]


def test_a_pack_carries_experts_row_by_row() -> None:
    """Two samples of 2 and 3 read tokens, one layer, one of four experts; padding goes on with the first tokens'."""
    samples = [
        Sample((5,), (6, 7), 0.0, True, (0.0,) * 2, experts=experts([3, 1])),
        Sample((5, 6), (7, 8), 0.0, True, (0.0,) * 2, experts=experts([2, 0, 1])),
    ]
    pack = build_microbatch(samples, [1, 0], 4, torch.device("cpu"))
    told = pack.packed_seq_params.expert_TLK
    assert told is not None and told[:, 0, 0].tolist() == [2, 0, 1, 3, 1, 2, 0, 1]
    assert pack.without_experts().packed_seq_params.expert_TLK is None
    bare = build_microbatch(choosing_themselves(samples), [1, 0], 4, torch.device("cpu"))
    assert bare.packed_seq_params.expert_TLK is None


def experts(numbers: list[int]) -> RoutedExperts:
    return RoutedExperts.of(torch.tensor(numbers).view(-1, 1, 1).numpy(), 4)


def test_a_router_apart_from_its_layer_is_refused() -> None:
    choice = GivenChoice()
    choice.begin(torch.tensor([[1], [0]], dtype=torch.uint8))
    scores, index = choice.get_replay_topk(torch.tensor([[0.1, 0.9], [0.7, 0.3]]), 1)
    assert scores.tolist() == [[pytest.approx(0.9)], [pytest.approx(0.7)]] and index.tolist() == [[1], [0]]
    choice.end()
    with pytest.raises(RunError, match="apart from its layer"):
        choice.get_replay_topk(torch.ones(2, 2), 1)
    choice.begin(None)
    choice.end()
    assert choice.get_replay_topk(torch.tensor([[0.1, 0.9]]), 1, default_compute_topk=_top)[1].tolist() == [[1]]


def _top(scores: torch.Tensor, topk: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.topk(scores, topk, dim=1)


def test_what_replay_does_not_go_with(tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "hf")
    with pytest.raises(UserError, match="rollout.routing_replay = True: qwen3 has no experts"):
        expert_shape(read_hf_config(model))
    replay = {"routing_replay": True}
    for sections, named in (
        ({"rollout": replay | {"replay": "rollouts"}}, "recorded rollouts have no experts"),
        ({"rollout": replay | {"max_staleness": 1}, "algorithm": {"tis_cap": 2}}, "read again by other weights"),
        ({"rollout": replay | {"plan": "luffy"}}, "did not draw as a whole"),
        ({"rollout": replay, "megatron": {"moe_router_fusion": True}}, "takes no experts from outside"),
        ({"rollout": replay, "megatron": {"recompute_modules": ["moe"]}}, "recomputes routers apart"),
    ):
        with pytest.raises(UserError, match=named):
            make_config(model, **sections)
