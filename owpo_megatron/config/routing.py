"""Refuse what `rollout.routing_replay` does not go with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from owpo_megatron.errors import UserError
from owpo_megatron.methods.method import Method

if TYPE_CHECKING:
    from owpo_megatron.config.run import Config


def check_routing_replay(config: Config, plans: type[Method]) -> None:
    """Refuse runs whose samples lack an engine's experts, or whose routers would not get them.

    Args:
        plans: the method whose plan asks for responses.

    Raises:
        UserError: naming rollout.routing_replay, and what to change, or the field of `megatron` that is in the way.
    """
    roll, raw = config.rollout, config.megatron
    if not roll.routing_replay:
        return
    why = ""
    if roll.replay is not None:
        why = "recorded rollouts have no experts; set false, or leave rollout.replay out"
    elif config.environment is not None:
        why = "episodes are put together from turns, whose experts are not; set false, or leave environment out"
    elif config.engine.router is not None:
        why = "a router does not pass experts on; set false, or give engine.urls"
    elif roll.max_staleness:
        why = "responses that a push interrupts are read again by other weights; set false, or rollout.max_staleness 0"
    elif not plans.takes_episodes or plans.stores_responses:
        why = f"{plans.name} trains on responses that the engine did not draw as a whole; set false, or use another"
    if why:
        raise UserError("rollout.routing_replay", True, why)
    if raw.get("moe_router_fusion"):
        remedy = "the fused router takes no experts from outside; set rollout.routing_replay false, or leave it out"
        raise UserError("megatron.moe_router_fusion", True, remedy)
    again = sorted({"mlp", "moe"} & set(raw.get("recompute_modules") or ()))
    if again:
        remedy = "recomputes routers apart from their layer; with rollout.routing_replay use parallel.recompute full"
        raise UserError("megatron.recompute_modules", again, remedy)
