"""Experts of an engine's answers: read and refused by hand, and those of a real SGLang server (`make test-extra`).

Not covered: CUDA, a server that fuses shared experts into the routed ones.
"""

from __future__ import annotations

import base64
import pickle
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from family_cases import CASES
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.config import EngineConfig, SyncConfig
from owpo_megatron.engine import start_fleet
from owpo_megatron.engine.answers import BadAnswer, Expected, read_answer
from owpo_megatron.engine.fleet import Fleet
from owpo_megatron.engine.generate_body import generate_body
from owpo_megatron.engine.members import UrlEngine
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.families import EngineLayout, expert_shape
from owpo_megatron.run.rollouts import parse_rollout, plain_rollout
from owpo_megatron.sync import make_sync
from owpo_megatron.trainer.batches import check_experts
from owpo_megatron.types import ExpertShape, Group, Prompt, RoutedExperts, SampleRequest, Sampling

SHAPE = ExpertShape(num_layers=2, layers=(1,), number=4, chosen=2)  # the first layer is dense
REQUEST = SampleRequest(Prompt("p", (5, 6), "", ""), 0)
SAMPLING = Sampling(4, experts=True)
EXPERTS = [[[0, 0], [3, 1]], [[0, 0], [0, 2]], [[0, 0], [2, 1]]]  # of 5, 6 and the first response token


def answer(told: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {"output_token_logprobs": [[-0.5, 7, None], [-0.1, 2, None]], "weight_version": "1"}
    meta["finish_reason"] = {"type": "stop"}
    if told is not None:
        meta["routed_experts"] = told
    return {"meta_info": meta, "output_ids": [7, 2]}


def encoded(experts: Any) -> str:
    return base64.b64encode(numpy.array(experts, dtype="<i4").tobytes()).decode()


def read(told: Any) -> Any:
    return read_answer(answer(told), REQUEST, SAMPLING, Expected(experts=SHAPE))


def test_experts_of_the_layers_that_have_them() -> None:
    rollout = read(encoded(EXPERTS))
    assert rollout.experts.tensor().tolist() == [[[3, 1]], [[0, 2]], [[2, 1]]]
    assert rollout.experts.tensor().dtype == torch.uint8
    assert pickle.loads(pickle.dumps(rollout)) == rollout
    assert read_answer(answer(encoded(EXPERTS)), REQUEST, Sampling(4)).experts is None, "not asked for"
    many = RoutedExperts.of(numpy.array([[[300, 2]]]), 512)
    assert many.tensor().dtype == torch.int16 and many.tensor().tolist() == [[[300, 2]]]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (None, "no routed_experts"),
        ("?", "no base64"),
        (encoded(EXPERTS[:2]), "8 numbers in routed_experts for 3 tokens, 2 layers and 2 experts"),
        (encoded([[[0, 0], [4, 1]], *EXPERTS[1:]]), "beyond the 4"),
        (encoded([[[0, 0], [1, 1]], *EXPERTS[1:]]), "an expert twice"),
    ],
)
def test_wrong_experts_are_refused(told: Any, why: str) -> None:
    with pytest.raises(BadAnswer, match=why):
        read(told)


def test_only_what_is_trained_on_is_asked_for() -> None:
    assert generate_body([REQUEST], SAMPLING)["return_routed_experts"] is True
    assert "return_routed_experts" not in generate_body([REQUEST], Sampling(4))


def test_a_server_without_experts_is_refused() -> None:
    fleet = Fleet([UrlEngine("http://127.0.0.1:1", EngineConfig())], EngineConfig())
    fleet.clients[0]._info = {"enable_return_routed_experts": False}
    with closing(fleet), pytest.raises(UserError, match="--enable-return-routed-experts"):
        fleet.ask_for_experts(SHAPE)


def test_responses_without_experts_are_named() -> None:
    """Saved rollouts have none, and neither has a pool; a trained prompt may be another than the engine's."""
    rollout = read(encoded(EXPERTS))
    saved = parse_rollout(plain_rollout(rollout))
    assert saved.experts is None and replace(rollout, experts=None) == saved
    check_experts([Group((rollout,), (), ())])
    stored = replace(saved, origin="replay")
    with pytest.raises(RunError, match=r"origin replay\) to prompt p has no experts, and 3 tokens are trained on"):
        check_experts([Group((rollout, stored), (), ())])
    with pytest.raises(RunError, match="has experts of 3 tokens, and 2 tokens are trained on"):
        check_experts([Group((replace(rollout, trained_ids=(5,)),), (), ())])


# ------------------------------------------------------------------------------------------ a real server
REQUESTS = [SampleRequest(Prompt(f"p/{i}", (5, 9, 40 + i, 17), "", ""), seed=900 + i) for i in range(8)]


@pytest.mark.server
@pytest.mark.extra
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_an_engine_returns_what_it_computed_with(family: str, engine_python: Path, tmp_path: Path) -> None:
    """Replaying its experts gives the engine's log-probs, cached prompts included; with
    others it has not."""
    hf = make_hf_model(tmp_path / "hf", family, **(CASES.get(family, [{}])[0] | {"eos_token_id": 2}))
    policy = build_policy(make_config(hf))
    raw = {"load_format": "dummy", "enable_return_routed_experts": True}
    config = EngineConfig(python=engine_python, device="cpu", max_restarts=0)
    with start_fleet(config, hf, "float32", raw, tmp_path / "logs") as fleet:
        with closing(make_sync(SyncConfig(), fleet.clients, tmp_path / "sync", EngineLayout.of(policy.hf))) as sync:
            sync.push(policy.named_weights(), 1)
        fleet.ask_for_experts(expert_shape(policy.hf))
        again = [replace(one, seed=one.seed + 50) for one in REQUESTS]
        rollouts = list(fleet.generate([*REQUESTS, *again], Sampling(12, experts=True)))
    samples = [
        replace(random_samples(0, count=1)[0], prompt_ids=one.prompt.token_ids, response_ids=one.response_ids,
                behaviour_logp=one.behaviour_logp, old_logp=None, ref_logp=None, experts=one.experts)
        for one in rollouts
    ]  # fmt: skip
    engine = torch.cat([torch.tensor(one.behaviour_logp.tolist()) for one in rollouts])

    assert (torch.cat(policy.logprobs(samples)) - engine).abs().max() < 1e-4
    wrong = [replace(one, experts=_next(one.experts, policy.hf.num_experts)) for one in samples]
    assert (torch.cat(policy.logprobs(wrong)) - engine).abs().mean() > 1e-2, "the experts decide something"


def _next(experts: RoutedExperts | None, number: int) -> RoutedExperts:
    assert experts is not None
    return RoutedExperts.of((experts.tensor().numpy().astype(int) + 1) % number, number)
