"""The policy and the reference: two slots of one sharded model."""

from owpo_megatron.policy.policy import MegatronPolicy
from owpo_megatron.policy.reference import SlotReference

__all__ = ["MegatronPolicy", "SlotReference"]
