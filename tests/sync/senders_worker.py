"""Pushes of one policy to a server, from every rank that has a part of it and from rank 0 alone."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any


class Push:
    """A policy in this layout, and its way to the server."""

    def __init__(
        self, model: Path, layout: dict[str, Any], url: str, bucket_bytes: int = 20_000, policy: Any = None, **sync: Any
    ):
        from tiny import build_policy, make_config

        from owpo_megatron.config import SyncConfig
        from owpo_megatron.engine import EngineClient
        from owpo_megatron.families import EngineLayout, read_hf_config
        from owpo_megatron.sync import make_senders, make_sync
        from owpo_megatron.trainer.main_rank import MainRank

        self.policy = policy or build_policy(make_config(model, parallel=layout))
        self.topology = self.policy.topology
        engine_layout = EngineLayout.of(read_hf_config(model))
        config = SyncConfig(**sync)
        self.notes: list[str] = []
        self.senders = make_senders(config, self.topology, self.policy, engine_layout)
        if self.senders is not None:
            self.senders._bucket_bytes = bucket_bytes  # many buckets of a tiny model
            self.senders.notify = self.notes.append
        self.lost: list[str] = []
        self.client = EngineClient(url)
        self.client.owner = "tests"

        def main(senders: Any) -> MainRank:
            folder = Path("unused")
            sync = make_sync(config, [self.client], folder, engine_layout, senders) if self.topology.is_main else None
            topology, policy = self.topology, self.policy
            return MainRank(topology.broadcast, policy.named_weights, sync, self._revive, senders=senders)

        self.by_all, self.by_one = main(self.senders), main(None)

    def _revive(self, error: Exception) -> int:
        self.lost.append(str(error))
        return 0


def push_both_ways(cases: list[tuple[Path, dict[str, Any]]], url: str) -> list[dict[str, Any]]:
    """Make for each case a push by all senders, then one by rank 0."""
    found = []
    for model, layout in cases:
        push = Push(model, layout, url)
        push.by_all.push(1)
        push.by_one.push(2)
        found.append({"senders": push.policy.weight_senders(), "notes": push.notes})
    return found


def push_with_trouble(model: Path, layout: dict[str, Any], url: str) -> dict[str, Any]:
    """One push, then one by ranks of which the last reaches no server."""
    from owpo_megatron.engine import EngineClient, EngineGone

    push = Push(model, layout, url)
    push.by_all.push(1)
    if push.topology.rank == push.topology.world_size - 1:

        def fails(self: Any, timeout: float = 0.0) -> Any:
            raise EngineGone(self.url, "/model_info is not reachable: no route")

        EngineClient.model_info = fails  # type: ignore[method-assign]
    push.client.incarnation += 1  # as after a restart: reach is looked at again
    push.by_all.push(2)
    return {"lost": push.lost, "notes": push.notes}


def die_while_sending(model: Path, layout: dict[str, Any], url: str, dies: int, folder: Path) -> None:
    """Rank `dies` is killed in its turn; the others write the error that they end with."""
    from owpo_megatron.mcore import gathering

    gathering.GATHER_BYTES = 10_000
    push = Push(model, layout, url, bucket_bytes=5_000)
    if push.topology.rank == dies:
        assert push.senders is not None
        push.senders._transport.sending = lambda engines: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    try:
        push.by_all.push(1)
    except Exception as error:
        (folder / f"rank_{push.topology.rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def push_to_engine(model: Path, layout: dict[str, Any], url: str, transports: list[str]) -> list[dict[str, Any]]:
    """Two pushes by each transport, in turn, with the engine's checksums compared; weights move in between."""
    import torch

    found: list[dict[str, Any]] = []
    pushes: list[Push] = []
    for transport in transports:
        policy = pushes[0].policy if pushes else None
        pushes.append(Push(model, layout, url, policy=policy, transport=transport, verify="hash"))
    for version, push in enumerate([*pushes, *pushes], 1):
        with torch.no_grad():
            for param in push.policy._chunks[0].parameters():
                param.add_(0.01)
        push.by_all.push(version)
        if push.topology.is_main:
            found.append({"version": push.client.weight_version(), "lost": push.lost, "notes": push.notes})
    for push in pushes:
        if push.senders is not None:
            push.senders.close()
    return found
