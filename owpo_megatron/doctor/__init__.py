"""The doctor: looks at everything a run needs, before it starts and on every node inside a job, and says what to mend.

Nothing here is imported before its check runs, so that the doctor works where torch, psutil or anything else is broken.
"""

from owpo_megatron.doctor.examine import CHECKS, examine
from owpo_megatron.doctor.finding import Finding, Scope, Status

__all__ = ["CHECKS", "Finding", "Scope", "Status", "examine"]
