"""Weights from the trainer to the engines: three transports, one sequence."""

from owpo_megatron.sync.push import EngineSync, Transport, WeightEngine
from owpo_megatron.sync.registry import make_sync

__all__ = ["EngineSync", "Transport", "WeightEngine", "make_sync"]
