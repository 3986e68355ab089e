"""Make the file of a run's metrics, with the speed that its lines get."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel, forward_flops
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.run.metrics import MetricsFile
from owpo_megatron.run.speed import Speed, peak_flops
from owpo_megatron.trainer.checks import StepChecks
from owpo_megatron.types import Sink


def build_metrics(config: Config, model: HFModel, sinks: Sequence[Sink], checks: StepChecks) -> MetricsFile:
    """The metrics file of global rank 0; the checks judge its lines, and are its last sink."""
    return MetricsFile(RunFolder.of(config).metrics, (*sinks, checks), _speed(config, model), checks.of)


def _speed(config: Config, model: HFModel) -> Speed:
    """Cost of a forward pass per token, from the shapes of the weights."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = peak_flops(device, config.model.dtype)
    return Speed(*forward_flops(model), ranks=config.parallel.world_size, peak=peak)
