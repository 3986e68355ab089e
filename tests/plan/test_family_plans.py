"""The memory plan of every family: parameters of a rank as megatron-core makes them, and activations as autograd keeps.

Not covered: whether the figures hold on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import CASES
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.config import ParallelConfig
from owpo_megatron.families import HFModel, check_parallel, layers_of_stages
from owpo_megatron.methods import make_method
from owpo_megatron.plan import make_plan
from owpo_megatron.plan.parameters import share_of_stage, whole_model

GIB = 1 << 30


def halves(model: HFModel) -> list[ParallelConfig]:
    layouts = [ParallelConfig(pp=pp) for pp in (2, 3) if min(layers_of_stages(model.num_layers, pp)) > 0]
    if model.delta is None:
        layouts.append(ParallelConfig(tp=2, sp=True))
    if model.experts:
        layouts.append(ParallelConfig(dp=2, ep=2))
    if model.experts and model.delta is None:
        layouts.append(ParallelConfig(tp=2, sp=True, etp=1, ep=2))
    for layout in layouts:
        check_parallel(model, layout)
    return layouts


@pytest.mark.parametrize("family", CASES)
def test_parameters_of_a_rank(family: str, tmp_path: Any) -> None:
    """One rank has what the policy has; the halves of each layout make up the model."""
    hf = make_hf_model(tmp_path / "hf", family, **CASES[family][0])
    config = make_config(hf)
    policy = build_policy(config)
    made = sum(param.numel() for chunk in policy._chunks for param in chunk.parameters())
    model = policy.hf
    whole = share_of_stage(model, ParallelConfig(), 0)
    assert whole.total == made
    for layout in halves(model):
        shares = [share_of_stage(model, layout, stage) for stage in range(layout.pp)]
        total = sum(share.total for share in shares)
        assert total < whole.total or layout.pp > 1
        if layout.pp > 1:
            assert total == whole.total
        if layout.ep == 2:
            assert shares[0].expert == whole.expert // 2
            assert (shares[0].dense == whole.dense) == (layout.tp == 1)
    plan = make_plan(config, 80 * GIB, cuda=False)
    assert plan.parameters == whole_model(model) and plan.problem is None


@pytest.mark.parametrize("family", CASES)
def test_activations_are_within_the_plan(family: str, tmp_path: Any) -> None:
    """The plan is a close upper estimate of the memory that autograd keeps after a forward pass."""
    hf = make_hf_model(tmp_path / "hf", family, **CASES[family][0])
    config = make_config(hf, data={"max_prompt_tokens": 8}, optimizer={"tokens_per_microbatch": 1})
    policy = build_policy(config)
    parameters = {param.untyped_storage().data_ptr() for chunk in policy._chunks for param in chunk.parameters()}
    kept: dict[int, int] = {}
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (sample, *_) = random_samples(1, vocab_size=90)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.update([sample], make_method("grpo"))
    largest = sum(kept.values())
    tokens = len(sample.prompt_ids) + len(sample.response_ids)
    planned = make_plan(config, 80 * GIB, cuda=False).trainer
    per_token = planned.activations / max(1, config.data.max_prompt_tokens + config.rollout.max_response_tokens)
    assert 0.3 * per_token * tokens < largest < 2.5 * per_token * tokens
