"""Configuration of a run. Imports no torch."""

from owpo_megatron.config.checks import ChecksConfig
from owpo_megatron.config.data import DataConfig, SourceConfig
from owpo_megatron.config.engine import EngineConfig
from owpo_megatron.config.environment import EnvironmentConfig
from owpo_megatron.config.evaluation import EvalConfig, SetConfig
from owpo_megatron.config.file import Section
from owpo_megatron.config.launch import LaunchConfig
from owpo_megatron.config.method import AlgorithmConfig, RolloutConfig
from owpo_megatron.config.model import HF_FILES, ModelConfig, hf_folder
from owpo_megatron.config.optimizer import OptimizerConfig
from owpo_megatron.config.parallel import Overlap, ParallelConfig
from owpo_megatron.config.reference import ReferenceConfig, TeacherConfig
from owpo_megatron.config.reward import RewardConfig
from owpo_megatron.config.run import CheckpointConfig, Config
from owpo_megatron.config.sinks import ProfileConfig, SinksConfig
from owpo_megatron.config.sync import SyncConfig
from owpo_megatron.config.verifier import VerifierConfig

__all__ = [
    "HF_FILES",
    "AlgorithmConfig",
    "CheckpointConfig",
    "ChecksConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "LaunchConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Overlap",
    "ParallelConfig",
    "ProfileConfig",
    "ReferenceConfig",
    "RewardConfig",
    "RolloutConfig",
    "Section",
    "SetConfig",
    "SourceConfig",
    "SinksConfig",
    "SyncConfig",
    "TeacherConfig",
    "VerifierConfig",
    "hf_folder",
]
