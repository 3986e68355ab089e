"""Destinations of a run's metrics: the file, with the speed that its lines get, and trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel, forward_flops
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.run.metrics import MetricsFile
from owpo_megatron.run.speed import Speed, peak_flops
from owpo_megatron.sinks import make_sinks
from owpo_megatron.trainer.checks import StepChecks
from owpo_megatron.types import Sink


def build_metrics(config: Config, model: HFModel, sinks: Sequence[Sink], checks: StepChecks) -> MetricsFile:
    """The metrics file of global rank 0; the checks judge its lines, and are its last sink."""
    return MetricsFile(RunFolder.of(config).metrics, (*sinks, checks), _speed(config, model), checks.of)


def build_trackers(config: Config, say: Callable[[str], None], stack: contextlib.ExitStack) -> Sequence[Sink]:
    """The trackers of `sinks`, on global rank 0; `stack` closes them."""
    trackers = make_sinks(config, say)
    for tracker in trackers:
        stack.callback(tracker.close)
    return trackers


def _speed(config: Config, model: HFModel) -> Speed:
    """Cost of a forward pass per token, from the shapes of the weights."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = peak_flops(device, config.model.dtype)
    return Speed(*forward_flops(model), ranks=config.parallel.world_size, peak=peak)
