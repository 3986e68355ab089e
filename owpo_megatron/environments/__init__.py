"""Answers to the policy between its turns: the protocol of environments, episodes over an engine, and some tools."""

from owpo_megatron.environments.build import EnvironmentBuilder
from owpo_megatron.environments.catalogue import EnvironmentMaker
from owpo_megatron.environments.engine import EpisodeEngine
from owpo_megatron.environments.play import play
from owpo_megatron.environments.pool import EnvironmentPool
from owpo_megatron.environments.protocol import Environment, Message, Observation, Problem
from owpo_megatron.environments.turns import TurnTemplate

__all__ = [
    "Environment",
    "EnvironmentBuilder",
    "EnvironmentMaker",
    "EnvironmentPool",
    "EpisodeEngine",
    "Message",
    "Observation",
    "Problem",
    "TurnTemplate",
    "play",
]
