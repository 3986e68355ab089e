"""The doctor: checks everything a run needs, before it starts or on every node of a job, and names remedies.

No check is imported before it runs, so that the doctor works where torch, psutil or anything else is broken.
"""

from owpo_megatron.doctor.examine import CHECKS, examine
from owpo_megatron.doctor.finding import Finding, Scope, Status

__all__ = ["CHECKS", "Finding", "Scope", "Status", "examine"]
