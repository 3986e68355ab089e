"""The trackers. Each imports its package when it is made."""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.sinks.names import settings

log = logging.getLogger(__name__)
_IDS = "sinks.json"  # in the run folder: which run of each tracker belongs to it, so that a resumed run goes on there


class TensorBoard:
    """Event files in RUN/tensorboard. No network, no account."""

    def __init__(self, config: Config, run_dir: Path):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. `sinks.wandb` holds arguments of wandb.init, e.g. {mode: offline, entity: my-team}."""

    def __init__(self, config: Config, run_dir: Path):
        import wandb

        ids = _Ids(run_dir)
        given = dict(config.sinks.wandb)
        self._run = wandb.init(
            **{
                "project": config.sinks.project,
                "name": config.name,
                "id": ids.get("wandb") or secrets.token_hex(4),
                "resume": "allow",
                "dir": str(run_dir),
                "config": config.model_dump(mode="json"),
                "settings": wandb.Settings(init_timeout=60, console="off", silent=True),
                **given,
            }
        )
        ids.set("wandb", self._run.id)
        # Steps that are trained again after a resume are logged again: W&B's own counter would drop them.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow. `sinks.mlflow` may hold tracking_uri (default: mlruns/ in runs_dir) and tags."""

    def __init__(self, config: Config, run_dir: Path):
        # An unreachable server is an error after seconds, not after seven retries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer releases ask for a database by default
        from mlflow.tracking import MlflowClient

        given = dict(config.sinks.mlflow)
        uri = given.get("tracking_uri") or (config.runs_dir / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        ids = _Ids(run_dir)
        known = ids.get("mlflow")
        if known is None:
            experiment = self._client.get_experiment_by_name(config.sinks.project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(config.sinks.project)
            self._id = self._client.create_run(number, run_name=config.name, tags=given.get("tags")).info.run_id
            ids.set("mlflow", self._id)
            for name, value in settings(config.model_dump(mode="json")).items():
                self._client.log_param(self._id, name, value[:500])
        else:
            self._id = known
            self._client.update_run(self._id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """trackio, Hugging Face's local tracker. `sinks.trackio` holds arguments of trackio.init, e.g. {space_id: me/s}."""

    def __init__(self, config: Config, run_dir: Path):
        import trackio
        import trackio.run
        import trackio.utils

        # Their messages would come between the run's lines on the terminal.
        for module in (trackio, trackio.run, trackio.utils):
            vars(module)["print"] = lambda *words, **_: log.info("%s", " ".join(map(str, words)))
        self._trackio = trackio
        trackio.init(
            **{
                "project": config.sinks.project,
                "name": config.name,
                "config": config.model_dump(mode="json"),
                "resume": "allow",
                "embed": False,
                **config.sinks.trackio,
            }
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Ids:
    """RUN/sinks.json."""

    def __init__(self, run_dir: Path):
        self._file = run_dir / _IDS
        self._known: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def get(self, tracker: str) -> str | None:
        return self._known.get(tracker)

    def set(self, tracker: str, run_id: str) -> None:
        current = json.loads(self._file.read_text()) if self._file.is_file() else {}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(current | {tracker: run_id}) + "\n")
