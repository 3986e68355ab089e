"""The policy, the reference and teachers: slots of one sharded model."""

from owpo_megatron.policy.policy import MegatronPolicy
from owpo_megatron.policy.reference import SlotReference
from owpo_megatron.policy.sources import check_same_model
from owpo_megatron.policy.teachers import SlotTeacher

__all__ = ["MegatronPolicy", "SlotReference", "SlotTeacher", "check_same_model"]
