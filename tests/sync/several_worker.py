"""Trains on two tensor-parallel ranks and brings the weights to two engines after every update.

The engines: the one at URL, to which weights are sent inline, and a server of two tensor-parallel ranks that this run
starts, which sees its shared memory. In one of the pushes that server is killed. At the end an sglang-router is put in
front of both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

UPDATES, KILLED_AT = 10, 7
TRANSPORTS = ["tensor", "distributed", "disk"]


def start(url: str, python: str, model: Path, folder: Path) -> Any:
    from owpo_megatron.config import EngineConfig
    from owpo_megatron.engine import Fleet, Server
    from owpo_megatron.engine.members import UrlEngine

    config = EngineConfig(python=Path(python), device="cpu", tp=2)
    server = Server(config, model, "float32", {"load_format": "dummy"}, folder / "engine.log")
    server.start()
    return Fleet([UrlEngine(url, config), server], config)


def kill_when_the_next_weights_come(server: Any) -> None:
    """SIGKILL for SGLang's main process at the second bucket of the next push, with the first one in place."""
    import psutil

    client, asked = server.client, []
    load = client.update_from_tensor

    def die(payloads: list[bytes]) -> None:
        asked.append(len(payloads))
        if len(asked) == 2:
            client.update_from_tensor = load
            (main_process,) = psutil.Process(server.pid).children()
            os.kill(main_process.pid, signal.SIGKILL)
        load(payloads)

    client.update_from_tensor = die


def start_router(python: str, urls: list[str], folder: Path) -> Any:
    """An sglang-router over the engines, as its users start it; returns its process and its URL."""
    from owpo_megatron.engine import EngineClient, EngineGone
    from owpo_megatron.engine.server import _free_port

    port, metrics = _free_port("127.0.0.1"), _free_port("127.0.0.1")
    command = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--prometheus-port", str(metrics), "--worker-urls", *urls]
    with (folder / "router.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    client = EngineClient(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "router.log").read_text()[-2000:]
        try:
            if len(client.workers()) == len(urls):
                break
        except EngineGone:
            pass
        time.sleep(0.2)
    return process, client.url


def train_with_two_engines(model: Path, url: str, python: str, folder: Path) -> dict[str, Any] | None:
    """Return the checks that held in every round and behind the router; None on ranks other than the main one."""
    from tiny import make_config, random_samples

    from owpo_megatron.config import EngineConfig, SyncConfig
    from owpo_megatron.engine import start_fleet
    from owpo_megatron.families import EngineLayout, read_hf_config
    from owpo_megatron.mcore.topology import init_topology
    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import MegatronPolicy
    from owpo_megatron.sync import make_sync
    from owpo_megatron.trainer.main_rank import MainRank
    from owpo_megatron.trainer.sync_check import LogprobCheck
    from owpo_megatron.types import SampleRequest, Sampling

    config, hf = make_config(model, parallel={"tp": 2}), read_hf_config(model)
    topology = init_topology(config.parallel, config.seed)
    fleet = start(url, python, model, folder) if topology.is_main else None
    policy = MegatronPolicy(config.model, config.parallel, config.optimizer, None, hf, topology)
    syncs = []
    if fleet is not None:
        syncs = [
            make_sync(SyncConfig(transport=name, verify="hash"), fleet.clients, folder / "sync", EngineLayout.of(hf))
            for name in TRANSPORTS
        ]
        for sync in syncs:
            sync._bucket_bytes = 40_000  # many buckets of a tiny model
    control = MainRank(
        topology.broadcast,
        policy.named_weights,
        syncs[0] if syncs else None,
        fleet.revive if fleet else lambda error: 0,
    )
    check = LogprobCheck(1e-4, config.rollout.temperature, control, policy, fleet, hf.vocab_size)
    if fleet is not None:
        fleet.on_restart = control.push_again
    rounds = []
    for version in range(1, UPDATES + 1):
        policy.update(random_samples(version, logps=False), make_method("grpo"))
        if fleet is not None:
            control._sync = syncs[(version - 1) % len(syncs)]
            if version == KILLED_AT:
                kill_when_the_next_weights_come(fleet.engines[1])
        control.push(version)
        differences = check()
        if fleet is not None:
            versions, restarts = fleet.weight_versions(), list(fleet._restarts)
            rounds.append({"differences": differences, "versions": versions, "restarts": restarts})
    if fleet is not None:
        router, address = start_router(python, [client.url for client in fleet.clients], folder)
        try:
            behind = start_fleet(EngineConfig(router=address), model, "float32", {}, folder)
            sync = make_sync(SyncConfig(), behind.clients, folder / "sync")
        except BaseException:
            router.kill()
            raise
        control._sync, control._revive, check._fleet = sync, behind.revive, behind
    policy.update(random_samples(UPDATES + 1, logps=False), make_method("grpo"))
    control.push(UPDATES + 1)
    differences = check()
    if fleet is None:
        return None
    requests = [SampleRequest(request.prompt, seed) for seed in range(8) for request in check._requests]
    through, directly = behind.generate(requests, Sampling(8)), fleet.engines[1].client.generate(requests, Sampling(8))
    held = {
        "engines": len(behind.clients),
        "differences": differences,
        "versions": sorted({rollout.policy_version for rollout in through}),
        "same tokens": sum(a.response_ids == b.response_ids for a, b in zip(through, directly, strict=True)),
    }
    router.kill()
    router.wait()
    for one in (*syncs, sync):
        one.close()
    behind.close()
    fleet.close()
    return {"rounds": rounds, "router": held}
