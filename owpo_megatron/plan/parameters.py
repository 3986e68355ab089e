"""Parameters per rank: the family's table of weights, divided by the parallel layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from owpo_megatron.config import ParallelConfig
from owpo_megatron.families import HFModel, layers_of_stages, padded_vocab_size
from owpo_megatron.families.rules import EMBEDDING, OUTPUT_LAYER, Rule
from owpo_megatron.families.weights import in_layer


@dataclass(frozen=True)
class Share:
    """Parameters on one rank. Experts are counted apart: fewer data-parallel ranks hold copies of them."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        return self.dense + self.expert


def whole_model(model: HFModel) -> int:
    """Parameters of the model without any padding."""
    total = 0
    for rule in _rules(model):
        count = sum(math.prod(model.size(size) for size in part.shape) for part in rule.hf)
        total += count * _occurrences(model, rule, range(model.num_layers))
    return total


def share_of_stage(model: HFModel, parallel: ParallelConfig, stage: int) -> Share:
    """Parameters on each rank of a pipeline stage, padding rows of the vocabulary included.

    The first stage has the embedding, the last one the head (a second copy of a tied embedding) and the final norm.
    With interleaved stages a rank's layers are not consecutive; where some have experts and others not, the count is
    that of consecutive ones.
    """
    first, last = stage == 0, stage == parallel.pp - 1
    stages = layers_of_stages(model.num_layers, parallel.pp)
    layers = range(sum(stages[:stage]), sum(stages[: stage + 1]))
    dense = expert = 0
    for rule in _rules(model):
        count = _on_rank(model, rule, parallel)
        if rule.per_expert:
            expert += count * _occurrences(model, rule, layers) // parallel.ep
        elif rule.per_layer:
            dense += count * _occurrences(model, rule, layers)
        elif rule.megatron[0] == EMBEDDING:
            dense += count * (first or (last and model.tied))
        elif last:
            dense += count
    return Share(dense, expert)


def _rules(model: HFModel) -> list[Rule]:
    """Rules of trained parameters: without the constants of a router, and without the head of a tied model."""
    return [r for r in model.rules if not r.float32 and not (model.tied and r.megatron[0] == OUTPUT_LAYER)]


def _occurrences(model: HFModel, rule: Rule, layers: range) -> int:
    """Number of parameters of a rule in these layers, experts counted one by one; 1 outside the layers."""
    if not rule.per_layer:
        return 1
    return sum(in_layer(model, rule, layer) for layer in layers) * (model.num_experts if rule.per_expert else 1)


def _on_rank(model: HFModel, rule: Rule, parallel: ParallelConfig) -> int:
    """Elements of one such parameter on one tensor-parallel rank."""
    total, split = 0, parallel.expert_tp if rule.per_expert else parallel.tp
    for part in rule.hf:
        sizes = [model.size(size) for size in part.shape]
        if part.shape[0] == "vocab":
            sizes[0] = padded_vocab_size(model.vocab_size, parallel.tp)
        total += math.prod(sizes) // (split if rule.tp_dim is not None else 1)
    return total
