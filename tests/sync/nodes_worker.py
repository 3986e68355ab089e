"""Ranks that are nodes of their own, each with an engine: pushes through an owner per node."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOSTS = ("127.0.0.1", "localhost")  # of rank 0's engine, and of rank 1's


def push_to_every_node(
    cases: list[tuple[Path, dict[str, Any]]], urls: list[str], hosts: Sequence[str] = HOSTS
) -> list[dict[str, Any]]:
    """Make for each case two pushes to all engines; `hosts` are the names by which each rank finds its own."""
    from tiny import build_policy, make_config

    from owpo_megatron.engine import EngineClient
    from owpo_megatron.families import EngineLayout, read_hf_config
    from owpo_megatron.mcore import gathering
    from owpo_megatron.sync.bucket import Staged, on_host
    from owpo_megatron.sync.nodes import NodeOwners
    from owpo_megatron.sync.payload import by_value
    from owpo_megatron.sync.push import EngineSync, on_all
    from owpo_megatron.sync.tensor import TensorTransport
    from owpo_megatron.trainer.main_rank import MainRank

    gathering.GATHER_BYTES = 20_000
    found: list[dict[str, Any]] = []
    lost: list[str] = []

    def deliver(engines: Any, staged: Staged) -> None:
        on_all(engines, lambda engine: engine.update_from_tensor([by_value(staged)]))

    def revive(error: Exception) -> int:
        lost.append(str(error))
        return 0

    for model, layout in cases:
        policy = build_policy(make_config(model, parallel=layout))
        ranks, sent = policy.topology, EngineLayout.of(read_hf_config(model)).sent
        names: dict[str, Any] = {"machine": f"node {ranks.rank}", "hosts": [hosts[ranks.rank]]}
        owners = NodeOwners(ranks, policy, policy.weight_senders(), deliver, on_host, sent, **names)
        clients = [EngineClient(url) for url in urls]
        sync = EngineSync(TensorTransport(), clients, 1 << 20, senders=owners) if ranks.is_main else None
        main = MainRank(ranks.broadcast, policy.named_weights, sync, revive, senders=owners)
        main.push(1)
        main.push(2)
        facts: dict[str, Any] = {"owns": owners.owns_a_node, "mine": [client.url for client in owners._mine]}
        if ranks.is_main:
            facts |= {"versions": [client.weight_version() for client in clients], "lost": list(lost)}
        found.append(facts)
        lost.clear()
        owners.close()
    return found
