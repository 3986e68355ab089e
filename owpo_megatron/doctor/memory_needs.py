"""Memory needs of a run, as `owpo plan` estimates them from the configuration and the model's config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.plan import Plan

RANK_BYTES, ENGINE_BYTES = 1 << 29, 3 << 29
"""Host memory of a rank and of an engine before they hold any weight: Python, torch, megatron, SGLang."""
CPU_CACHE_TOKENS = 32768  # engine/command.py's default on a CPU
# A checkpoint holds master weights and Adam's two moments in float32, the policy's weights and the reference's.
MOMENTS_AND_MASTER = 12


def plan_of(config: Config, gpu_bytes: int, cuda: bool) -> Plan | None:
    """None where the model, torch or megatron cannot be read: those have findings of their own."""
    try:
        from owpo_megatron.plan import make_plan

        return make_plan(config, gpu_bytes, cuda=cuda)
    except (UserError, ImportError, AttributeError):
        return None


def host_bytes(config: Config, plan: Plan, ranks: int) -> int:
    """Needs of a node without GPUs: its ranks, and an engine beside them."""
    total = ranks * (plan.trainer.total + plan.trainer.host + RANK_BYTES)
    if plan.engine is not None:
        tokens = int(config.sglang.get("max_total_tokens", CPU_CACHE_TOKENS))
        total += plan.engine.weights + tokens * plan.engine.token + ENGINE_BYTES
    return total


def disk_bytes(config: Config, plan: Plan) -> int:
    """Checkpoints that a run keeps, one more while it writes, and the exported model."""
    weights = plan.parameters * (4 if config.model.dtype == "float32" else 2)
    checkpoint = plan.parameters * MOMENTS_AND_MASTER + 2 * weights
    return checkpoint * (config.checkpoint.keep + 1) + weights


def count_of(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}{'s' * (number != 1)}"


def size(count: float) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"
