"""Weights & Biases (offline), MLflow and trackio, each the real package with its local store, read back by itself.

They have an environment of their own, `make sinks`. Not covered: their servers.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from owpo import ROOT

PYTHON = ROOT / ".venv-sinks" / "bin" / "python"
pytestmark = [
    *(pytest.mark.sinks, pytest.mark.process),
    pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason=f"no {PYTHON}; run `make sinks`"),
]
# Two attempts of one run, the second from step 2 on, as after a resume.
RUN = """
import json, sys
from owpo_megatron.config import Config
from owpo_megatron.sinks import make_sinks
config, said = Config.build(json.loads(sys.argv[1])), []
for first in (1, 2):
    (sink,) = make_sinks(config, said.append)
    for step in range(first, 4):
        sink.step({"step": step, "loss": 1 / step, "seconds": {"total": 2.0}})
    sink.evaluation(3, {"pass@1": 0.25})
    sink.close()
assert not said, said
"""
READ = {
    "mlflow": """
import json, sys
from mlflow.tracking import MlflowClient
client = MlflowClient(tracking_uri=sys.argv[1])
experiment = client.get_experiment_by_name("my-project")
(run,) = client.search_runs([experiment.experiment_id])
history = client.get_metric_history(run.info.run_id, "train/loss")
print(json.dumps({"losses": [[one.step, one.value] for one in history], "params": run.data.params,
                  "status": run.info.status, "pass": run.data.metrics["eval/pass_at_1"], "name": run.info.run_name}))
""",
    "trackio": """
import json
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("my-project", SQLiteStorage.get_runs("my-project")[0])
print(json.dumps({"runs": SQLiteStorage.get_runs("my-project"),
                  "losses": [[one["step"], one["train/loss"]] for one in logs if "train/loss" in one]}))
""",
}


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return {"name": "a", "runs_dir": str(tmp_path), "model": {"path": "m"}, "data": {"source": "task:cipher"}}


def python(code: str, argument: str, **env: str) -> str:
    done = subprocess.run(
        [str(PYTHON), "-c", code, argument], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wandb_offline_writes_its_run_folder(raw: dict[str, Any], tmp_path: Path) -> None:
    """Both attempts are one run: the same id, in sinks.json and in the folders' names."""
    sinks = {"to": ["wandb"], "project": "my-project", "wandb": {"mode": "offline"}}
    python(RUN, json.dumps(raw | {"sinks": sinks}))
    folders = sorted((tmp_path / "a" / "wandb").glob("offline-run-*"))
    run_id = json.loads((tmp_path / "a" / "sinks.json").read_text())["wandb"]
    # two attempts within one second: W&B appends a number
    assert len(folders) == 2 and all(f"-{run_id}" in folder.name for folder in folders)
    data = b"".join(file.read_bytes() for folder in folders for file in folder.glob(f"run-{run_id}.wandb"))
    for text in (b"train/loss", b"eval/pass_at_1", b"train/seconds/total", b"my-project"):
        assert text in data


def test_mlflow_keeps_steps_settings_and_one_run(raw: dict[str, Any], tmp_path: Path) -> None:
    python(RUN, json.dumps(raw | {"sinks": {"to": ["mlflow"], "project": "my-project"}}))
    uri = (tmp_path / "mlruns").absolute().as_uri()
    found = json.loads(python(READ["mlflow"], uri, MLFLOW_ALLOW_FILE_STORE="true").splitlines()[-1])
    assert sorted({tuple(pair) for pair in found["losses"]}) == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert found["params"]["parallel.tp"] == "1" and found["params"]["algorithm.name"] == "owpo"
    assert (found["status"], found["pass"], found["name"]) == ("FINISHED", 0.25, "a")


def test_trackio_keeps_steps_in_its_local_store(raw: dict[str, Any], tmp_path: Path) -> None:
    env = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    said = python(RUN, json.dumps(raw | {"sinks": {"to": ["trackio"], "project": "my-project"}}), **env)
    assert said == "", "its own messages are not the run's"
    found = json.loads(python(READ["trackio"], "", **env).splitlines()[-1])
    assert found["runs"] == ["a"]
    assert {tuple(pair) for pair in found["losses"]} >= {(1, 1.0), (2, 0.5)}
