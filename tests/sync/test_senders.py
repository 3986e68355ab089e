"""Pushes from several ranks: the bits of one sender, in an order that an engine can follow, and an end for every rank.

Real gloo ranks and real gathers; a server that records, and one real SGLang engine, which has several groups at a time.
Not covered: NCCL, engines on other machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankFailed, Ranks
from recording_server import RecordingServer, digest
from safetensors.torch import load_file
from senders_worker import die_while_sending, push_both_ways, push_to_engine, push_with_trouble
from tiny import make_hf_model

from owpo_megatron.engine import Fleet

pytestmark = pytest.mark.ranks

BEGIN = ["pause_generation", "flush_cache", "update_weight_version -1", "begin_weight_update"]
LAYOUTS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("dense", {"tp": 2}, [0]),
    ("dense", {"pp": 2}, [0, 1]),
    ("tied", {"pp": 2}, [0, 1]),
    ("experts", {"dp": 2, "ep": 2}, [0, 0, 1]),  # dense parameters, experts of either index
    ("experts", {"tp": 2, "sp": True, "etp": 1, "ep": 2}, [0, 0, 1]),  # rank 1 shares rank 0's dense parameters
    ("experts", {"pp": 2, "dp": 2, "ep": 2}, [0, 2, 0, 1, 2, 3]),
    ("dense", {"pp": 2, "tp": 2}, [0, 2]),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("senders")
    experts: dict[str, Any] = {"family": "qwen3_moe", "norm_topk_prob": True, "num_hidden_layers": 2}
    return {
        "dense": make_hf_model(root / "dense", num_hidden_layers=2),
        "tied": make_hf_model(root / "tied", tied=True, num_hidden_layers=2),
        "experts": make_hf_model(root / "experts", **experts),
    }


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    server = RecordingServer()
    yield server
    server.close()


@pytest.mark.parametrize("count", [2, 4])
def test_all_ranks_send_the_bits_of_one(
    count: int, ranks: Ranks, models: dict[str, Path], server: RecordingServer
) -> None:
    """Every tensor of the checkpoint arrives once, whoever sends it."""
    layouts = [(name, layout, senders) for name, layout, senders in LAYOUTS if _ranks_of(layout) == count]
    found = ranks.run(count, push_both_ways, [(models[name], layout) for name, layout, _ in layouts], server.url)
    for index, (name, _, senders) in enumerate(layouts):
        wanted = sorted((key, digest(one)) for key, one in load_file(models[name] / "model.safetensors").items())
        assert sorted(server.updates[2 * index]) == sorted(server.updates[2 * index + 1]) == wanted
        assert [one[index] for one in found] == [{"senders": senders, "notes": []}] * count
    one_push = len(server.calls) // len(layouts) // 2
    assert one_push > len(BEGIN) + 4
    for call in ("pause_generation", "begin_weight_update", "end_weight_update", "continue_generation"):
        assert server.calls.count(call) == 2 * len(layouts)
    assert [call for call in server.calls if call != "mark"][: len(BEGIN)] == BEGIN
    assert server.calls[-3:] == ["end_weight_update", "update_weight_version 2-tests", "continue_generation"]


def _ranks_of(layout: dict[str, Any]) -> int:
    return int(layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1))


def test_what_an_engine_refuses_is_an_error_on_rank_0_and_the_push_begins_again(
    ranks: Ranks, models: dict[str, Path], server: RecordingServer
) -> None:
    """The error names the rank whose weights were refused. A rank that does not reach the engine sends nothing: then
    all weights go through rank 0, with a line about it."""
    server.refuse["update_weights_from_tensor"] = [0, 0, 400]
    main, other = ranks.run(2, push_with_trouble, models["dense"], {"pp": 2}, server.url)
    (lost,) = main["lost"]
    assert "/update_weights_from_tensor refused with 400: no update_weights_from_tensor today (weights of rank" in lost
    assert main["notes"] == [
        f"rank 1 does not reach an engine: engine {server.url}/model_info is not reachable: no route; "
        "all weights go through rank 0"
    ]
    assert other == {"lost": [], "notes": []}
    failed, again, by_one = server.updates
    assert len(failed) < len(again) and sorted(again) == sorted(by_one)
    after = server.calls[server.calls.index("update_weights_from_tensor 400") + 1 :]
    assert set(after[: after.index("pause_generation")]) <= {"update_weights_from_tensor"}, "what was on its way"
    assert server.version == "2-tests"


@pytest.mark.parametrize("dies", [0, 2])
def test_a_sender_that_dies_is_named_on_every_rank(
    dies: int, ranks: Ranks, models: dict[str, Path], server: RecordingServer, tmp_path: Path
) -> None:
    """Rank 2 sends the second stage's weights, which rank 3 gathers with it; rank 1 does so with rank 0."""
    with pytest.raises(RankFailed):
        ranks.run(4, die_while_sending, models["dense"], {"pp": 2, "tp": 2}, server.url, dies, tmp_path)
    ends = {int(file.name[-1]): file.read_text() for file in tmp_path.glob("rank_*")}
    assert ends.keys() == {0, 1, 2, 3} - {dies}
    for end in ends.values():
        assert end.startswith("RunError: ") and f"rank {dies}" in end and "ended" in end, ends
    assert server.calls[-1] in ("begin_weight_update", "update_weights_from_tensor"), (
        "no engine resumes on such weights"
    )


@pytest.mark.server
def test_an_engine_takes_the_weights_of_every_rank(
    ranks: Ranks, engine: Fleet, models: dict[str, Path], tiny_model: Path
) -> None:
    """Its checksums after each push, twice by each transport: two senders' groups are there at a time."""
    url = engine.clients[0].url
    found, _ = ranks.run(2, push_to_engine, tiny_model, {"pp": 2}, url, ["distributed", "tensor"])
    assert found == [{"version": version, "lost": [], "notes": []} for version in (1, 2, 3, 4)]
