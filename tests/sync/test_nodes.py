"""Engines on every node, each served by a rank of its own node: what arrives where, in which order.

Two gloo ranks stand for two nodes, servers that record for their engines; buckets are handed over by value in place of
CUDA handles, which need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes_worker import HOSTS, push_to_every_node
from rank_pool import RankFailed, Ranks
from recording_server import RecordingServer, digest
from safetensors.torch import load_file
from tiny import make_hf_model

pytestmark = pytest.mark.ranks

LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2},  # rank 1 gathers with rank 0, whose weights it gets
    {"pp": 2},  # both send
    {"dp": 2, "ep": 2},
]


@pytest.fixture
def servers() -> Iterator[list[RecordingServer]]:
    found = [RecordingServer(), RecordingServer()]
    yield found
    for server in found:
        server.close()


def urls(servers: list[RecordingServer]) -> list[str]:
    return [server.url.replace("127.0.0.1", host) for server, host in zip(servers, HOSTS, strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("nodes")
    experts: dict[str, Any] = {"family": "qwen3_moe", "norm_topk_prob": True, "num_hidden_layers": 2}
    dense = make_hf_model(root / "dense", num_hidden_layers=2)
    return [dense, dense, make_hf_model(root / "experts", **experts)]


def test_every_node_gets_all_weights_from_its_own_rank(
    ranks: Ranks, models: list[Path], servers: list[RecordingServer]
) -> None:
    """And one refusal, by the engine of the second node, is an error on rank 0, which begins again."""
    servers[1].refuse["update_weights_from_tensor"] = [0, 0, 400]
    cases = list(zip(models, LAYOUTS, strict=True))
    main, other = ranks.run(2, push_to_every_node, cases, urls(servers))
    for index, (model, _) in enumerate(cases):
        lost = main[index].pop("lost")
        assert main[index] == {"owns": True, "mine": urls(servers)[:1], "versions": [2, 2]}
        assert other[index] == {"owns": True, "mine": urls(servers)[1:]}
        assert len(lost) == (index == 0) and all("refused with 400" in one for one in lost)
        assert all(one.endswith("(weights of rank 1)") for one in lost)
        wanted = sorted((key, digest(one)) for key, one in load_file(model / "model.safetensors").items())
        for server in servers:
            assert all(sorted(update) == wanted for update in server.updates[2 * index + 1 : 2 * index + 3])
            assert len(server.updates) == 2 * len(cases) + 1
    order = [call for call in servers[0].calls if call != "update_weights_from_tensor"]
    one = ["pause_generation", "flush_cache", "update_weight_version -1", "begin_weight_update", "end_weight_update"]
    assert order[-7:] == [*one, "update_weight_version 2", "continue_generation"]


def test_an_engine_on_no_node_is_named(ranks: Ranks, models: list[Path], servers: list[RecordingServer]) -> None:
    words = f"engine {urls(servers)[1]} is on no node of the trainer; use sync.transport tensor"
    with pytest.raises(RankFailed, match=words):
        ranks.run(2, push_to_every_node, [(models[0], LAYOUTS[0])], urls(servers), ("127.0.0.1", "elsewhere"))
