"""Programs that nobody trusts, e.g. code that a model wrote: run apart, within limits, ended with all they started."""

from owpo_megatron.verifiers.sandbox.isolation import require, why_refused
from owpo_megatron.verifiers.sandbox.limits import Isolation, Limits
from owpo_megatron.verifiers.sandbox.program import PYTHON, Outcome, run

__all__ = ["PYTHON", "Isolation", "Limits", "Outcome", "require", "run", "why_refused"]
