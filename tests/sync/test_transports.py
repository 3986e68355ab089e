"""Every transport against a real server: weights, versions, log-probs, failures.

Tensor-parallel engines: tests/engine/test_engine.py. Not covered: NCCL, and engines on other machines.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from tiny import make_hf_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from owpo_megatron.config import SyncConfig
from owpo_megatron.engine import EngineClient, Fleet, Server
from owpo_megatron.errors import EngineError
from owpo_megatron.families import EngineLayout
from owpo_megatron.sync import EngineSync, make_sync
from owpo_megatron.sync.delta.replica import Mirror
from owpo_megatron.sync.delta.transport import DeltaTransport
from owpo_megatron.sync.disk import DiskTransport
from owpo_megatron.sync.distributed import DistributedTransport
from owpo_megatron.sync.hashes import EngineHashes
from owpo_megatron.sync.push import Transport
from owpo_megatron.sync.tensor import TensorTransport
from owpo_megatron.types import Prompt, SampleRequest, Sampling

pytestmark = pytest.mark.server

TRANSPORTS: dict[str, Callable[[Path], Transport]] = {
    "tensor": lambda folder: TensorTransport(),
    "tensor by value": lambda folder: TensorTransport(share=False),
    "distributed": lambda folder: DistributedTransport(),
    "disk": DiskTransport,
}

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


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_weights_and_version_arrive(
    transport: str, engine: Fleet, models: list[PreTrainedModel], tmp_path: Path
) -> None:
    """Twice each, in many small buckets, from views of one flat buffer as the parameters are; log-probs agree,
    and every parameter of the engine has the checksum of what was sent."""
    hashes = EngineHashes(engine.clients, EngineLayout(models[0].config.num_key_value_heads))
    sync = EngineSync(TRANSPORTS[transport](tmp_path), engine.clients, bucket_bytes=40_000, check=hashes)
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


def test_nothing_listens_to_other_machines(engine: Fleet, models: list[PreTrainedModel]) -> None:
    """Neither SGLang's server and scheduler, nor the store of the group that weights are broadcast in."""
    sync = EngineSync(DistributedTransport(), engine.clients, 1 << 20)
    with closing(sync):
        sync.push(models[0].state_dict().items(), 7)
        server = engine.engines[0]
        assert isinstance(server, Server)
        family = [psutil.Process(), psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        ears = {one.laddr.ip for process in family for one in process.net_connections("tcp") if one.status == "LISTEN"}
    assert "127.0.0.1" in ears and not ears & {"0.0.0.0", "::"}, ears


def test_checksums_name_what_did_not_arrive(engine: Fleet, models: list[PreTrainedModel]) -> None:
    """One bit of one matrix changes on its way, one tensor is lost on its way: both are named, and the engine serves
    nothing until it has been pushed to again."""

    class Faulty(TensorTransport):
        @contextmanager
        def session(self, engines, version):
            with super().session(engines, version) as send:

                def wrong(bucket):
                    state = {name: tensor.clone() for name, tensor in bucket}
                    state["model.layers.1.mlp.down_proj.weight"].view(torch.int32)[7, 3] ^= 1
                    del state["model.layers.0.self_attn.k_proj.weight"]
                    send(list(state.items()))

                yield wrong

    hashes = EngineHashes(engine.clients, EngineLayout(models[0].config.num_key_value_heads))
    EngineSync(TensorTransport(), engine.clients, 1 << 20, check=hashes).push(models[0].state_dict().items(), 5)
    with pytest.raises(EngineError) as raised:
        EngineSync(Faulty(), engine.clients, 1 << 20, check=hashes).push(models[1].state_dict().items(), 6)
    assert str(raised.value).endswith(
        "does not hold the weights it was sent: "
        "model.layers.0.self_attn.qkv_proj.weight, model.layers.1.mlp.down_proj.weight"
    )
    assert engine.weight_versions() == [-1]
    with pytest.raises(EngineError, match=r"different weight versions \[-1\]"):
        engine.generate(REQUESTS, Sampling(2))
    engine.on_restart = lambda: EngineSync(TensorTransport(), engine.clients, 1 << 20, check=hashes).push(
        models[1].state_dict().items(), 6
    )
    try:
        assert difference(engine, models[1]) < 1e-4, "an engine that missed an update gets it before it generates"
    finally:
        engine.on_restart = None
    assert engine.weight_versions() == [6]


@pytest.fixture
def mirror(engine: Fleet, tmp_path: Path) -> Iterator[Mirror]:
    """One beside the engine, to which no memory is shared for the time."""
    (client,) = engine.clients
    with closing(Mirror("127.0.0.1", "key", tmp_path / "copies")) as made:
        client.mirror, client.shares_memory = f"http://127.0.0.1:{made.port}", False
        client._headers = client._headers | {"authorization": "Bearer key"}
        yield made
    client.mirror, client.shares_memory = None, True
    del client._headers["authorization"]


def test_delta_carries_what_an_optimizer_changed(
    engine: Fleet, models: list[PreTrainedModel], tmp_path: Path, mirror: Mirror
) -> None:
    """AdamW at a learning rate of 1e-6, weights in bfloat16, an engine that is reached by files alone: after each of
    five updates every parameter of it has the checksum of what was sent. After the first less than an eighth of the
    bytes travels: patches of 1 to 2 % and, at this size, four times as much of names and hashes."""
    model = copy.deepcopy(models[0]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    generator = torch.Generator().manual_seed(5)
    hashes = EngineHashes(engine.clients, EngineLayout(model.config.num_key_value_heads))
    transport = DeltaTransport(tmp_path / "shared", tmp_path / "copies")
    with closing(EngineSync(transport, engine.clients, 1 << 20)) as sync:
        for version in range(1, 6):
            weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
            sync.push(weights.items(), version)
            # this engine computes in float32, which holds every bfloat16
            deque(hashes.follow((name, tensor.float()) for name, tensor in weights.items()), maxlen=0)
            hashes.check()
            everything = sum(tensor.nbytes for tensor in weights.values())
            assert (
                (transport.written_bytes > everything)
                if version == 1
                else (0 < transport.written_bytes < everything / 8)
            )
            ids = torch.randint(0, 96, (4, 16), generator=generator)
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_delta_to_an_engine_of_this_machine(engine: Fleet, models: list[PreTrainedModel], tmp_path: Path) -> None:
    """The engine reads the trainer's copy: nothing is sent. In float32, as a first try on a laptop would be."""
    settings = SyncConfig(transport="disk", delta=True, verify="hash", mirror=tmp_path / "copies")
    layout = EngineLayout(models[0].config.num_key_value_heads)
    with closing(make_sync(settings, engine.clients, tmp_path / "shared", layout)) as sync:
        for version, model in enumerate(models * 2, 1):
            sync.push(model.state_dict().items(), version)
            assert difference(engine, model) < 1e-4 and not (tmp_path / "shared").exists()
    assert not list((tmp_path / "copies").iterdir())


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


@pytest.mark.parametrize("transport", ["tensor", "distributed", "disk"])
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
            assert engine.weight_versions() == [-1], "neither the old weights nor the new ones"
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
