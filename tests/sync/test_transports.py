"""Every transport against a real server: weights, versions, log-probs, failures.

Tensor-parallel engines: tests/rollout/test_engine.py. Not covered: NCCL, and engines on other machines.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_hf_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from owpo_megatron.config import SyncConfig
from owpo_megatron.errors import EngineError
from owpo_megatron.rollout import EngineClient, Fleet
from owpo_megatron.sync import EngineSync, make_sync
from owpo_megatron.sync.distributed import DistributedTransport
from owpo_megatron.sync.push import Transport
from owpo_megatron.sync.registry import TRANSPORTS
from owpo_megatron.types import Prompt, SampleRequest, Sampling

pytestmark = pytest.mark.server

REQUESTS = [SampleRequest(Prompt(f"p/{i}", (5, 9, 40 + i, 17), "", ""), seed=900 + i) for i in range(4)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[PreTrainedModel]:
    folder = tmp_path_factory.mktemp("sync_models")
    folders = [make_hf_model(folder / str(seed), eos_token_id=2, seed=seed) for seed in (11, 12)]
    return [AutoModelForCausalLM.from_pretrained(path).eval() for path in folders]


def difference(engine: Fleet, model: PreTrainedModel) -> float:
    """Largest |log-prob of the engine - log-prob of transformers| over the tokens of four samples."""
    differences = []
    for rollout in engine.generate(REQUESTS, Sampling(12)):
        prompt, response = rollout.prompt.token_ids, torch.tensor(rollout.response_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + rollout.response_ids])).logits[0, len(prompt) - 1 : -1]
        logp_L = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        differences.append((logp_L - torch.tensor(rollout.behaviour_logp)).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("transport", sorted(TRANSPORTS))
def test_weights_and_version_arrive(
    transport: str, engine: Fleet, models: list[PreTrainedModel], tmp_path: Path
) -> None:
    """Twice each, in many small buckets, from views of one flat buffer as the trainer's parameters are."""
    sync = EngineSync(TRANSPORTS[transport](tmp_path), engine.clients, bucket_bytes=40_000)
    for version, model in enumerate([*models, *models], 101):
        state = model.state_dict()
        flat = torch.cat([tensor.flatten() for tensor in state.values()])
        views = flat.split([tensor.numel() for tensor in state.values()])
        weights = [(name, view.view(state[name].shape)) for name, view in zip(state, views, strict=True)]
        sync.push(weights, version)
        assert engine.weight_versions() == [version]
        assert difference(engine, model) < 1e-4
    assert difference(engine, models[0]) > 1e-2, "the two models are too alike for this test to mean anything"
    sync.close()
    assert not list(tmp_path.iterdir()), "files were left behind"


def test_group_is_made_anew_for_a_restarted_engine(
    engine: Fleet, models: list[PreTrainedModel], tmp_path: Path
) -> None:
    transport = DistributedTransport()
    sync = EngineSync(transport, engine.clients, bucket_bytes=1 << 20)
    sync.push(models[0].state_dict().items(), 1)
    first = transport._name
    sync.push(models[1].state_dict().items(), 2)
    assert transport._name == first
    engine.clients[0].connect(engine.clients[0].url)  # what a restart does to the client
    sync.push(models[0].state_dict().items(), 3)
    assert transport._name != first
    assert difference(engine, models[0]) < 1e-4
    sync.close()


@pytest.mark.parametrize("transport", sorted(TRANSPORTS))
def test_a_refused_update_is_an_error_and_the_next_push_recovers(
    transport: str, engine: Fleet, models: list[PreTrainedModel], tmp_path: Path
) -> None:
    """A weight of the wrong shape: SGLang answers 400 or dies of it, but never serves it under the new version."""
    sync = make_sync(SyncConfig(transport=transport), engine.clients, tmp_path)  # type: ignore[arg-type]
    sync.push(models[0].state_dict().items(), 7)
    wrong = dict(models[1].state_dict())
    wrong["model.norm.weight"] = torch.ones(5)
    with pytest.raises(EngineError, match="127.0.0.1"):
        sync.push(wrong.items(), 8)
    engine.on_restart = lambda: sync.push(models[1].state_dict().items(), 9)
    try:
        if not engine.revive():
            assert engine.weight_versions() == [7]
            sync.push(models[1].state_dict().items(), 9)
    finally:
        engine.on_restart = None
    assert engine.weight_versions() == [9]
    assert difference(engine, models[1]) < 1e-4
    sync.close()


def test_a_push_to_a_dead_engine_says_so(models: list[PreTrainedModel], tmp_path: Path) -> None:
    transport: Transport = TRANSPORTS["tensor"](tmp_path)
    sync = EngineSync(transport, [EngineClient("http://127.0.0.1:9")], 1 << 20)
    with pytest.raises(EngineError, match="127.0.0.1:9/pause_generation is not reachable"):
        sync.push(models[0].state_dict().items(), 1)
