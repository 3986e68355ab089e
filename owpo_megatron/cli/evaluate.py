"""owpo eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from owpo_megatron.cli.options import ConfigFile, Overrides
from owpo_megatron.cli.running import run_trainer
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A step_... folder of a run; otherwise the run's newest, else model.path."),
    ] = None,
) -> None:
    """Evaluate on held-out problems: Pass@k of the run's newest checkpoint, or of the model itself.

    Scores and responses go to runs/NAME/eval/.

    Example: owpo eval -c runs/quickstart/config.yaml eval.samples=32 'eval.pass_at=[1, 16]'
    """
    arguments = ["--eval-only"]
    if checkpoint is not None:
        if not checkpoint.is_dir():
            raise UserError("--checkpoint", checkpoint, "no such folder; give e.g. runs/NAME/checkpoints/step_000020")
        arguments += ["--checkpoint", str(checkpoint)]
    run_trainer(Config.load(config, overrides or []), arguments, keep_config=False)
