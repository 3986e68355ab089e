"""Every family's modules wait for their own parameters when they are called, or somebody waits for them.

One rank, and each parameter in a bucket of its own: an update that reads a parameter for which nobody waited fails. Not
covered: Transformer Engine's modules, which are called in the same places; values (tests/policy/test_late_gather.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from family_cases import CASES, WINDOWED
from megatron.core.distributed import DistributedDataParallelConfig
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.mcore import optimizer
from owpo_megatron.mcore.transformer import PolicyModel
from owpo_megatron.methods import make_method

FIRST = [(family, shapes[0]) for family, shapes in CASES.items()] + list(WINDOWED.items())


def updated(model: Path) -> Any:
    policy = build_policy(make_config(model, parallel={"overlap": "all"}))
    (chunk,) = policy._chunks
    assert len(chunk.bucket_groups) == len(list(chunk.parameters()))
    for number in range(2):
        policy.update(random_samples(number), make_method("owpo"))
    return policy


@pytest.fixture
def buckets_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = partial(DistributedDataParallelConfig, bucket_size=1)
    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", config)


@pytest.mark.extra
@pytest.mark.usefixtures("buckets_of_one")
@pytest.mark.parametrize(("family", "shape"), FIRST, ids=[f"{n}-{family}" for n, (family, _) in enumerate(FIRST)])
def test_families(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    policy = updated(make_hf_model(tmp_path / "model", family, **shape))
    assert len(policy.weights_digest()) == 16


@pytest.mark.usefixtures("buckets_of_one")
def test_many_gathers_under_way(tmp_path: Path) -> None:
    """100,000 in groups of 35: gloo's coalesced ones, megatron-core's own choice, end the process by then."""
    policy = build_policy(make_config(make_hf_model(tmp_path / "model"), parallel={"overlap": "all"}))
    before = policy.weights_digest()
    for _ in range(3000):
        policy._chunks.start()
        policy._chunks.finish()
    assert policy.weights_digest() == before


@pytest.mark.usefixtures("buckets_of_one")
def test_a_weight_that_nobody_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output layer's is read by the head, and its module is never called."""
    model = make_hf_model(tmp_path / "model")
    updated(model)
    stock = PolicyModel.head

    def hasty(self: PolicyModel) -> Any:
        hooks, self.output_layer._forward_pre_hooks = self.output_layer._forward_pre_hooks, {}
        try:
            return stock(self)
        finally:
            self.output_layer._forward_pre_hooks = hooks

    monkeypatch.setattr(PolicyModel, "head", hasty)
    with pytest.raises(AssertionError, match="may have read old values of output_layer.weight: no module waited"):
        updated(model)
