"""Sends metrics to experiment trackers: TensorBoard, Weights & Biases, MLflow, trackio."""

from owpo_megatron.sinks.guarded import GuardedSink
from owpo_megatron.sinks.make import check_installed, make_sinks

__all__ = ["GuardedSink", "check_installed", "make_sinks"]
