"""Worker process that executes one run after another, so that imports and the engine's start are paid only once.

    python -m owpo_megatron.experiments.worker LOGS_DIR

    stdin                      stdout
    a configuration (JSON) ->  {"ok": true} | {"ok": false, "reason": "...", "mistake": true|false}
    ...
    end of file            ->  the engine stops, the process exits

The engine outlives the runs: weights are pushed to it, so one engine serves every run of a model of its shape. On
SIGTERM or SIGINT the active run finishes its step and saves, and the worker exits.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.engine.shared import SharedEngine
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.launch.local import run_ranks
from owpo_megatron.launch.preflight import preflight
from owpo_megatron.launch.rank import end_with_parent
from owpo_megatron.run.layout import CONFIG, RunFolder

STOPPED = "stopped on request"


def make_run(config: Config, engine: SharedEngine) -> None:
    """Execute or resume a run: in this process, or with several ranks in processes of their own.

    Raises:
        UserError: the configuration or the environment is at fault.
        EngineError, RuntimeError: the run failed.
    """
    preflight(config)
    folder = RunFolder.of(config)
    logs = folder.logs
    logs.mkdir(parents=True, exist_ok=True)
    config.save(folder.config)
    if not config.engine.urls and config.rollout.replay is None:
        served = config.engine.model_copy(update={"urls": [engine.url(config)]})
        config = config.model_copy(update={"engine": served})
    if config.parallel.world_size > 1:
        file = logs / CONFIG
        config.save(file)
        outcome = run_ranks(["--config", str(file)], config.parallel.world_size, logs, "owpo_megatron.trainer.main")
        if outcome.code:
            raise RuntimeError(outcome.reason)
        return
    from owpo_megatron.trainer.train import train_run

    with (logs / "rank_0.log").open("a") as log, contextlib.redirect_stdout(log):
        train_run(config)


def main(logs: Path) -> int:
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # anything printed goes to the log, not between the answers
    engine = SharedEngine(logs / f"engine_{os.getpid()}.log")
    with contextlib.closing(engine):
        for line in sys.stdin:
            config = Config.build(json.loads(line))
            answer = _answer(config, engine)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if answer.get("reason") == STOPPED:
                break
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)  # the run's own handlers are gone with it
    return 0


def _answer(config: Config, engine: SharedEngine) -> dict[str, Any]:
    try:
        make_run(config, engine)
    except (UserError, EngineError) as error:
        return {"ok": False, "reason": str(error).splitlines()[0], "mistake": isinstance(error, UserError)}
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0], "mistake": False}
    if not RunFolder.of(config).is_finished:
        return {"ok": False, "reason": STOPPED, "mistake": False}
    return {"ok": True}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
