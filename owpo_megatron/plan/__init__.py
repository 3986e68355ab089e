"""Memory of a run before it is started: `owpo plan`."""

from owpo_megatron.plan.plan import Plan, make_plan

__all__ = ["Plan", "make_plan"]
