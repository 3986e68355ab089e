"""Routing of a mixture, as rollouts carry it: which layers have experts, how many, and how many a token goes to."""

from __future__ import annotations

from owpo_megatron.errors import UserError
from owpo_megatron.families.model import HFModel
from owpo_megatron.types import ExpertShape


def expert_shape(model: HFModel) -> ExpertShape:
    """The shape of a mixture's routing.

    Raises:
        UserError: a dense model, which has none.
    """
    if model.experts is None:
        remedy = f"{model.family_name} has no experts that could be replayed; set false"
        raise UserError("rollout.routing_replay", True, remedy)
    layers = tuple(layer for layer in range(model.num_layers) if model.has_experts(layer))
    return ExpertShape(model.num_layers, layers, model.experts.number, model.experts.router.chosen)
