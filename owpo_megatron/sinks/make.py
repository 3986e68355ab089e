"""The sinks that a configuration asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.sinks.guarded import GuardedSink, Tracker
from owpo_megatron.sinks.trackers import MLflow, TensorBoard, Trackio, WandB

TRACKERS: dict[str, tuple[Callable[..., Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}
"""Name in `sinks.to` -> (class, package that must be installed)."""


def check_installed(config: Config) -> None:
    """Raises UserError naming the package of a sink that is not installed in this environment."""
    for name in config.sinks.to:
        if importlib.util.find_spec(TRACKERS[name][1]) is None:
            raise UserError("sinks.to", name, f'not installed; pip install "owpo_megatron[{name}]", or leave it out')


def make_sinks(config: Config, warn: Callable[[str], None]) -> list[GuardedSink]:
    """Start every sink of `sinks.to`; call `close` on each when the run ends.

    Args:
        warn: called with one message when a sink fails.
    """
    return [GuardedSink(name, partial(TRACKERS[name][0], config, config.run_dir), warn) for name in config.sinks.to]
