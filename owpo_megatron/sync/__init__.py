"""Send weights from the trainer to the engines: four transports, one or several senders, a check of what arrived."""

from owpo_megatron.sync.fp8 import engine_arguments as fp8_engine_arguments
from owpo_megatron.sync.nodes import NodeOwners
from owpo_megatron.sync.push import EngineSync, Transport, WeightEngine
from owpo_megatron.sync.registry import make_senders, make_sync, run_arguments
from owpo_megatron.sync.senders import Ranks, Senders

__all__ = [
    "EngineSync",
    "NodeOwners",
    "Ranks",
    "Senders",
    "Transport",
    "WeightEngine",
    "fp8_engine_arguments",
    "make_senders",
    "make_sync",
    "run_arguments",
]
