"""A real SGLang server of the run's own, between a stranger on this machine and a signal that ends it.

Its numbers are compared with nothing: what a server computes differs from machine to machine. The run's own checks
compare trainer and server.
"""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
import urllib.request

import psutil
from ended import Wrong
from registry import fault
from trial import LIMIT, STEPS, Running, Trial

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.command import check_interpreter

STRANGERS = "a run's own engines answer only to it"
CHANGE = json.dumps({"new_version": "7", "abort_all_requests": False}).encode()


@fault("a stranger at a run's own engine", promise=STRANGERS, by=("ranks",))
def stranger(trial: Trial) -> None:
    """Is refused whatever is asked, and nothing of the run listens to other machines; the server is killed after."""
    check_interpreter(EngineConfig())
    run = trial.start("rollout.replay=null", f"sync.transport={trial.rng.choice(['tensor', 'distributed'])}")
    run.wait_until(trial.reached(1), "step 1")
    port = re.findall(r"--port (\d+)", (trial.logs / "engine_0.log").read_text())[-1]
    for path in ("/update_weight_version", "/generate", "/pause_generation"):
        _expect_refused(f"http://127.0.0.1:{port}{path}")
    ears = {
        one.laddr.ip for process in _family(run) for one in process.net_connections("tcp") if one.status == "LISTEN"
    }
    if ears & {"0.0.0.0", "::"}:
        raise Wrong(f"the run listens at {ears}")
    for process in _family(run):
        if "sglang::scheduler" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    run.wait(2 * LIMIT).done(r"engine 0 is lost, restart 1 of")
    summary = json.loads((trial.run_dir / "summary.json").read_text())
    if summary["steps_updated"] != STEPS:
        raise Wrong(f"not every step updated the weights: {summary}")


def _family(run: Running) -> list[psutil.Process]:
    ranks = [psutil.Process(pid) for pid in run.pids().values()]
    return [*ranks, *(child for rank in ranks for child in rank.children(recursive=True))]


def _expect_refused(url: str) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, CHANGE, {"Content-Type": "application/json"}), timeout=20)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return
        raise Wrong(f"{url} answers {error.code} to a stranger") from error
    raise Wrong(f"{url} obeys a stranger")
