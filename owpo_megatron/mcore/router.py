"""Choices of experts that megatron-core 0.16.1's routers do not make themselves.

megatron-core lets another choice in as a router's `router_replay`. Its own class of that name keeps one list of all
routers of the process, whose experts are set for a whole pass: with several microbatches in flight (pipeline stages,
recomputation) passes would get another's. Here the experts come with the pack, whichever pass reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from owpo_megatron.errors import RunError
from owpo_megatron.families import HFModel

Choice = tuple[torch.Tensor, torch.Tensor]
"""Scores and indices of the chosen experts, [T, topk] each."""


class GroupChoice:
    """Choose experts out of the groups whose best experts have the largest sum of scores.

    megatron-core sums as many of a group's experts as it takes from a group on average; DeepSeek-V2 looks at the best
    one alone, DeepSeek-V3 and GLM-4.5 at the best two, whatever the other numbers are. An object of this class takes
    the place of a router's `router_replay`, where megatron-core lets another choice than its own in.

    Args:
        best: experts of a group whose scores are summed.
    """

    def __init__(self, best: int):
        self._best = best

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Choice] | None = None,
    ) -> Choice:
        """Return scores and indices of the chosen experts, [T, topk] each, of scores [T, experts]."""
        assert num_groups is not None and group_topk is not None
        grouped = scores.unflatten(1, (num_groups, -1))
        group_scores = grouped.topk(self._best, dim=-1).values.sum(-1)
        chosen = group_scores.topk(group_topk, dim=-1).indices
        unseen = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
        found = grouped.masked_fill(unseen[..., None], -torch.inf).flatten(1).topk(topk, dim=1)
        return found.values, found.indices


@dataclass
class RoutedSeqParams(PackedSeqParams):
    """A pack's sequences, and the experts that its tokens go to."""

    expert_TLK: torch.Tensor | None = None
    """[T / cp, layers with experts, topk] on the device; with sequence parallelism a rank reads its own rows of it."""


class GivenChoice:
    """Takes the experts that the pack under way brings along, with this router's scores of them.

    Args:
        own: the choice where a pack brings none; None: megatron-core's.
    """

    def __init__(self, own: GroupChoice | None = None):
        self._own = own
        self._expert_TK: torch.Tensor | None = None
        self._over = False

    def begin(self, expert_TK: torch.Tensor | None) -> None:
        """The layer begins; None: its router chooses."""
        self._expert_TK, self._over = expert_TK, False

    def end(self) -> None:
        """The layer's forward pass is over, and with it what was given to the router."""
        self._over = self._expert_TK is not None
        self._expert_TK = None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Choice] | None = None,
    ) -> Choice:
        """Return scores and indices of the experts, [T, topk] each, of scores [T, experts]; gradients flow through the
        scores.

        Raises:
            RunError: the router runs once more outside of its layer, where it would choose for itself.
        """
        if self._over:
            raise RunError(
                "rollout.routing_replay: a router ran apart from its layer, without the engine's experts; leave out "
                "the field of `megatron` that recomputes or schedules parts of a layer"
            )
        if self._expert_TK is not None:
            index_TK = self._expert_TK.long()
            return scores.gather(1, index_TK), index_TK
        if self._own is not None:
            return self._own.get_replay_topk(scores, topk, num_groups, group_topk, default_compute_topk)
        assert default_compute_topk is not None
        return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)


def let_packs_choose(model: torch.nn.Module, hf: HFModel) -> None:
    """Let the routers of a chunk take the experts that packs bring along (`RoutedSeqParams`)."""
    assert hf.experts is not None
    place_of = {layer: place for place, layer in enumerate(filter(hf.has_experts, range(hf.num_layers)))}
    router = hf.experts.router
    for layer in (module for module in model.modules() if isinstance(module, TransformerLayer)):
        if not isinstance(layer.mlp, MoELayer):
            continue
        choice = GivenChoice(GroupChoice(router.best) if router.chooses_groups_itself else None)
        layer.mlp.router.router_replay = choice
        _tell(layer, choice, place_of[layer.layer_number - 1])


def _tell(layer: TransformerLayer, choice: GivenChoice, place: int) -> None:
    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        expert_TLK = getattr(kwargs.get("packed_seq_params"), "expert_TLK", None)
        choice.begin(None if expert_TLK is None else own_rows(expert_TLK[:, place]))

    def own_rows(expert_TK: torch.Tensor) -> torch.Tensor:
        """All of the pack, or with sequence parallelism this tensor-parallel rank's chunk."""
        ranks = layer.mlp.router.tp_group
        return expert_TK.chunk(ranks.size())[ranks.rank()] if layer.config.sequence_parallel else expert_TK

    def after(*_: Any) -> None:
        choice.end()

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
