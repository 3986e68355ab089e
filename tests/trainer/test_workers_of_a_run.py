"""Number and place of a run's rollout workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_config

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launched import main_host, num_nodes
from owpo_megatron.trainer.build_workers import hosts, num_workers


def config(workers: int | str = "auto", **more: Any) -> Config:
    return make_config(Path("model"), rollout={"workers": workers} | more, parallel={"dp": 4})


def on_nodes(monkeypatch: pytest.MonkeyPatch, world: int, per_node: int, main: str = "127.0.0.1") -> None:
    values = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(per_node), "MASTER_ADDR": main}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_one_worker_per_node_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    on_nodes(monkeypatch, 32, 8)
    assert num_workers(config(), num_nodes()) == 4
    assert hosts(4, 32) == [0, 8, 16, 24], "each on the first rank of a node"
    on_nodes(monkeypatch, 8, 8)
    assert num_workers(config(), num_nodes()) == 0


def test_a_number_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    on_nodes(monkeypatch, 32, 8)
    assert [num_workers(config(count), num_nodes()) for count in (0, 3)] == [0, 3]


def test_rank_0_listens_where_the_ranks_meet_or_at_an_address_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service of Kubernetes leads to rank 0, and is no address of its machine (192.0.2.1 is nobody's)."""
    on_nodes(monkeypatch, 16, 8)
    assert main_host() == "127.0.0.1"
    on_nodes(monkeypatch, 16, 8, main="192.0.2.1")
    assert main_host() not in ("", "0.0.0.0", "192.0.2.1")


@pytest.mark.parametrize(
    ("told", "own", "host"),
    [
        (["127.0.1.1"], ["10.0.0.7"], "10.0.0.7"),  # as many machines have their own name in /etc/hosts
        (["127.0.1.1", "10.0.0.8"], ["10.0.0.7"], "10.0.0.8"),
        (["fd00::8"], ["fd00::7"], "fd00::8"),  # no IPv4 anywhere
    ],
)
def test_a_name_that_leads_to_the_machine_itself_is_no_address_for_others(
    told: list[str], own: list[str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_nodes(monkeypatch, 16, 8, main="node-8")
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    monkeypatch.setattr("owpo_megatron.launched._addresses", {"node-8": told, "node-7": own}.__getitem__)
    assert main_host() == host


@pytest.mark.parametrize(
    ("workers", "more", "remedy"),
    [(5, {}, "there are 4; lower it"), (2, {"replay": "recorded"}, "recorded rollouts need none"), (-1, {}, "")],
)
def test_what_cannot_be_is_refused(workers: int, more: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError, match=rf"rollout\.workers.*{remedy}"):
        config(workers, **more)
