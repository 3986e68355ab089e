"""`owpo serve` with a real SGLang server: it answers, is started again, and a signal ends all that it started.

Announced in a folder, with a mirror of the weights; without one (engine.urls) only what is printed is another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from tiny import make_hf_model
from transformers import AutoModelForCausalLM

from owpo_megatron.config import EngineConfig, SyncConfig
from owpo_megatron.engine import Fleet
from owpo_megatron.engine.command import check_environment
from owpo_megatron.engine.rendezvous import announced_engines
from owpo_megatron.errors import UserError
from owpo_megatron.families import EngineLayout
from owpo_megatron.sync import make_sync
from owpo_megatron.types import Prompt, SampleRequest, Sampling


@contextmanager
def serving(model: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command under way; killed at the end if it is still there."""
    try:
        check_environment(EngineConfig(), model)
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "owpo_megatron.cli.main", "serve", str(model), "--port", "0", *words]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield served
    finally:
        served.kill()
        served.wait()


@pytest.mark.server
def test_serve_takes_changes_of_weights_survives_its_server_and_ends_on_a_signal(tmp_path: Path) -> None:
    """Updates in bfloat16: all weights, then one element. SGLang is killed and restarted by `owpo serve`, whose mirror
    lives on: the next update is one element again, and the new server has every weight. SGLang's checksums prove that
    what arrived is what was sent (sync.verify: hash)."""
    model = make_hf_model(tmp_path / "model")
    copies, rendezvous, shared = tmp_path / "copies", tmp_path / "rendezvous", tmp_path / "shared"
    words = ["--dtype", "bfloat16", "--rendezvous", str(rendezvous), "--mirror", str(copies), "--restarts", "1"]
    words += ["--log", str(tmp_path / "engine.log"), "max_total_tokens=2048", "max_running_requests=8"]
    with serving(model, *words) as served:
        config = EngineConfig(rendezvous=rendezvous, startup_timeout=300)
        settings = SyncConfig(transport="disk", delta=True, verify="hash", mirror=tmp_path / "of_the_trainer")
        weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
        with (
            Fleet(announced_engines(rendezvous, config), config) as fleet,
            closing(make_sync(settings, fleet.clients, shared, layout=EngineLayout(2))) as sync,
        ):
            sync.push(weights.items(), 1)
            weights["model.layers.1.mlp.up_proj.weight"][2, 5] += 0.25
            sync.push(weights.items(), 2)
            assert sync._transport.written_bytes < 1000  # type: ignore[attr-defined]
            fleet.on_restart = lambda: sync.push(weights.items(), 3)
            family = psutil.Process(served.pid).children(recursive=True)
            engine = next(process for process in family if is_sglang(process))
            os.kill(engine.pid, signal.SIGKILL)
            psutil.wait_procs([engine])
            weights["model.layers.2.mlp.up_proj.weight"][7, 1] -= 0.25
            assert fleet.revive() == 1
            assert fleet.weight_versions() == [3]
            assert sync._transport.written_bytes < 1000  # type: ignore[attr-defined]
            (drawn,) = fleet.generate([SampleRequest(Prompt("p", (5, 6, 7), "", ""), seed=1)], Sampling(4))
            assert drawn.policy_version == 3 and 1 <= len(drawn.response_ids) <= 4
        assert len(list(copies.iterdir())) == 1
        family = psutil.Process(served.pid).children(recursive=True)
        served.send_signal(signal.SIGTERM)
        assert served.wait(timeout=30) == 0
        psutil.wait_procs(family, timeout=10)
        assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not any(list(folder.iterdir()) for folder in (copies, rendezvous, shared))


def is_sglang(process: psutil.Process) -> bool:
    """The server's main process, not the one that watches over it."""
    words = process.cmdline()
    return "sglang.launch_server" in words and not any(word.endswith("supervise.py") for word in words)
