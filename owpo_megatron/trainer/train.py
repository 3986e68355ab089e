"""Use a run's parts: train, or evaluate a checkpoint. Every rank calls these functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.conversion import write_hf
from owpo_megatron.run.layout import RunFolder, step_name
from owpo_megatron.run.summary import write_summary
from owpo_megatron.trainer.build import parts
from owpo_megatron.trainer.given import NOTHING, Given
from owpo_megatron.trainer.parts import Parts


def train_run(
    config: Config,
    stop_file: Path | None = None,
    given: Given = NOTHING,
    on_signals: bool = True,
    on_stop: Callable[[Callable[[], None]], None] = lambda stop: None,
    logs: Path | None = None,
) -> int:
    """Train (or go on training) the run that the configuration describes; returns the steps done.

    Args:
        stop_file: once it exists, the step under way is finished and saved, and the run stops.
        given: parts that are not made out of the configuration.
        on_signals: SIGTERM and SIGINT ask for a stop as well, while it trains, and a watchdog ends the process where
            the run hangs.
        on_stop: receives the function by which this process asks for a stop.
        logs: for what this rank writes when it fails; None: logs/ of the run folder.
    """
    with contextlib.ExitStack() as stack:
        made = parts(config, stack, given, stop_file, logs=logs)
        on_stop(made.stop.request)
        if on_signals:
            stack.enter_context(made.stop.on_signals())
            stack.enter_context(made.watchdog.running())
        with made.console.live() if made.console else contextlib.nullcontext():
            steps = made.loop().run()
        if steps == config.optimizer.steps:
            with made.watchdog.phase("finish"):
                _finish(config, made)
        return steps


def evaluate_run(config: Config, checkpoint: Path | None = None) -> None:
    """Evaluate a checkpoint (default: the run's newest, else the model); scores go to eval/ and the screen."""
    with contextlib.ExitStack() as stack:
        made = parts(config, stack, evaluation_only=True, checkpoint=checkpoint)
        step = made.state.restore(checkpoint, to_evaluate=True)
        made.main.push(step)

        def work() -> dict[str, Any]:
            assert made.evaluator is not None
            return made.evaluator.run(f"{step_name(step)}_eval")

        scores = made.main.run(work)
        if made.console:
            made.console.evaluation(step, scores)
            made.console.say(f"scores with intervals, and responses: {RunFolder.of(config).evaluations}")


def _finish(config: Config, made: Parts) -> None:
    """After the last step: the HF folder and the summary."""
    folder, swaps = RunFolder.of(config), made.reference.version.ref_id
    if config.checkpoint.export_hf:
        template = hf_folder(config.model.path)
        write_hf(folder.hf, template, made.model, made.policy.named_weights(), made.ranks.is_main)
    if made.console:
        write_summary(config, made.describe_engine(), made.reference.version, swaps, made.best.run)
        made.say(f"done: {folder.path} ({swaps} swaps of the reference)")
