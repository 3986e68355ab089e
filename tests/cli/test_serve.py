"""`owpo serve` with a real SGLang server: it answers, and a signal ends it and everything that it started."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from tiny import make_hf_model

from owpo_megatron.config import EngineConfig
from owpo_megatron.errors import UserError
from owpo_megatron.rollout.command import check_surroundings


@pytest.mark.server
def test_serve_answers_and_ends_on_a_signal(tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model")
    try:
        check_surroundings(EngineConfig(), model)
    except UserError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-u", "-m", "owpo_megatron.cli.main", "serve", str(model), "--port", "0"]
    command += ["--log", str(tmp_path / "engine.log"), "max_total_tokens=2048", "max_running_requests=8"]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout is not None
        lines = iter(served.stdout.readline, "")
        said = next(line for line in lines if "serving at" in line)
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
    finally:
        served.kill()
        served.wait()
