"""`owpo serve` with a real SGLang server: it answers, and a signal ends it and everything that it started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from tiny import make_hf_model
from transformers import AutoModelForCausalLM

from owpo_megatron.config import EngineConfig, SyncConfig
from owpo_megatron.errors import UserError
from owpo_megatron.rollout import Fleet
from owpo_megatron.rollout.command import check_surroundings
from owpo_megatron.rollout.rendezvous import announced_engines
from owpo_megatron.sync import make_sync

pytestmark = pytest.mark.server


@contextmanager
def serving(model: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command under way; killed at the end if it is still there."""
    try:
        check_surroundings(EngineConfig(), model)
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-u", "-m", "owpo_megatron.cli.main", "serve", str(model), "--port", "0", *words]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield served
    finally:
        served.kill()
        served.wait()


def test_serve_answers_and_ends_on_a_signal(tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model")
    log = str(tmp_path / "engine.log")
    with serving(model, "--log", log, "max_total_tokens=2048", "max_running_requests=8") as served:
        assert served.stdout is not None
        said = next(line for line in iter(served.stdout.readline, "") if "serving at" in line)
        found = re.search(r"http://[\d.]+:\d+", said)
        assert found is not None, said
        body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
        answer = httpx.post(f"{found.group()}/generate", json=body, timeout=60, trust_env=False)
        assert answer.json()["meta_info"]["completion_tokens"] == 4
        family = psutil.Process(served.pid).children(recursive=True)
        served.send_signal(signal.SIGTERM)
        assert served.wait(timeout=30) == 0
        psutil.wait_procs(family, timeout=10)
        assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_changes_of_weights_reach_an_engine_that_was_started_again(tmp_path: Path) -> None:
    """In bfloat16, by rendezvous: all weights, then one element. SGLang is killed and started again by `owpo serve`,
    whose mirror lives on: the next update is one element again, and the new server has every weight. Its end takes the
    copy away. Whether what arrived is what was sent, SGLang's checksums say (sync.verify: hash)."""
    model = make_hf_model(tmp_path / "model")
    copies, rendezvous = tmp_path / "copies", tmp_path / "rendezvous"
    words = ["--dtype", "bfloat16", "--rendezvous", str(rendezvous), "--mirror", str(copies), "--restarts", "1"]
    with serving(model, *words, "--log", str(tmp_path / "engine.log"), "max_total_tokens=2048") as served:
        config = EngineConfig(rendezvous=rendezvous, startup_timeout=300)
        settings = SyncConfig(transport="disk", delta=True, verify="hash", mirror=tmp_path / "of_the_trainer")
        with Fleet(announced_engines(rendezvous, config), config) as fleet:
            weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
            with closing(make_sync(settings, fleet.clients, tmp_path / "shared", num_kv_heads=2)) as sync:
                sync.push(weights.items(), 1)
                weights["model.layers.1.mlp.up_proj.weight"][2, 5] += 0.25
                sync.push(weights.items(), 2)
                assert sync._transport.written_bytes < 1000
                fleet.on_restart = lambda: sync.push(weights.items(), 3)
                engine = next(one for one in psutil.Process(served.pid).children(recursive=True) if is_sglang(one))
                os.kill(engine.pid, signal.SIGKILL)
                psutil.wait_procs([engine])
                weights["model.layers.2.mlp.up_proj.weight"][7, 1] -= 0.25
                assert fleet.revive() == 1
                assert fleet.weight_versions() == [3]
                assert sync._transport.written_bytes < 1000
        assert len(list(copies.iterdir())) == 1
        served.send_signal(signal.SIGTERM)
        assert served.wait(timeout=30) == 0
    assert not list(copies.iterdir()) and not list((tmp_path / "shared").iterdir()) and not list(rendezvous.iterdir())


def is_sglang(process: psutil.Process) -> bool:
    """The server's main process, not the one that watches over it."""
    words = process.cmdline()
    return "sglang.launch_server" in words and not any(word.endswith("supervise.py") for word in words)
