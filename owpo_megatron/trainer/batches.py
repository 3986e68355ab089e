"""From groups to annotated minibatches: advantages, the active-sample curriculum, old and reference log-probs.

Passes that need not run are not run: the old policy's with one update a step (it is the policy itself), the
reference's while it has the policy's weights, and the reference's on samples that are not active.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from owpo_megatron.config import Config
from owpo_megatron.methods import group_advantages, num_active, top_active
from owpo_megatron.trainer.loop import StepLog
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.stage import StagePlan
from owpo_megatron.types import Group, Objective, Policy, Reference, Sample, TrainBatch


class BatchBuilder:
    """Implements Batches. Pure but for the log-prob passes, which are collective."""

    def __init__(self, config: Config, plan: StagePlan):
        self._group_size = config.rollout.group_size
        self._updates = config.optimizer.updates_per_step
        self._algorithm = config.algorithm
        self._rules = RewardRules.of(config)
        self._plan = plan

    def build(self, groups: list[Group], step: int, reference: Reference) -> TrainBatch:
        """Advantages and active samples; ties of |A| go to the lower submission index."""
        size = self._group_size
        n_active = size
        if self._algorithm.curriculum:
            n_active = num_active(self._plan.step_in_stage(step), self._plan.stage_steps(step), size)
        samples: list[Sample] = []
        for group in groups:
            samples.extend(self._group_samples(group, n_active))
        return TrainBatch(tuple(samples), size, step, self._plan.stage(step), n_active, reference.version)

    def _group_samples(self, group: Group, n_active: int) -> Iterator[Sample]:
        counts = self._rules.counts(group)
        shaped = self._rules.shaped(group)
        graded = [index for index, inside in enumerate(counts) if inside]
        advantage_1G = torch.zeros(1, len(group.rewards))
        if graded:
            reward_1G = torch.tensor([[shaped[index] for index in graded]])
            advantage_1G[0, graded] = group_advantages(reward_1G, std=self._algorithm.advantage_std)[0]
        active_1G = top_active(advantage_1G, n_active)
        for index, rollout in enumerate(group.rollouts):
            yield Sample(
                prompt_ids=rollout.prompt.token_ids,
                response_ids=rollout.response_ids,
                advantage=float(advantage_1G[0, index]),
                active=bool(active_1G[0, index]) and counts[index],
                behaviour_logp=rollout.behaviour_logp,
                masked=not counts[index],
                domain=rollout.prompt.domain,
            )

    def annotate(
        self, batch: TrainBatch, policy: Policy, reference: Reference, objective: Objective, log: StepLog
    ) -> Iterator[list[Sample]]:
        """The step's minibatches, one after the other, with the log-probs that the objective needs.

        All passes run before the first minibatch is handed out: old and reference are those of the step's start.
        A minibatch is passed through the model in the same packs as in its update, so that its first ratio is
        exactly 1 where the weights are the same.
        """
        log.add(stage=batch.stage, n_active=batch.n_active, ref_id=batch.reference.ref_id)
        log.add(ref_step=batch.reference.source_step)
        minibatches = self._split(batch.samples)
        if objective.needs_old and len(minibatches) > 1:
            with log.timed("logp_old"):
                minibatches = [_with_old(samples, policy) for samples in minibatches]
        if objective.needs_reference != "none":
            with log.timed("logp_ref"):
                wanted_all = objective.needs_reference != "active"
                minibatches = [_with_reference(samples, reference, wanted_all) for samples in minibatches]
        yield from minibatches

    def _split(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Whole groups, in submission order, into (at most) updates_per_step minibatches of nearly equal size."""
        groups = len(samples) // self._group_size
        updates = min(self._updates, groups)
        bounds = [index * groups // updates * self._group_size for index in range(updates + 1)] if updates else [0]
        return [list(samples[start:end]) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def _with_old(samples: list[Sample], policy: Policy) -> list[Sample]:
    logps = policy.logprobs(samples)
    return [
        replace(sample, old_logp=logp, old_mode=policy.logp_mode) for sample, logp in zip(samples, logps, strict=True)
    ]


def _with_reference(samples: list[Sample], reference: Reference, wanted_all: bool) -> list[Sample]:
    wanted = [index for index, sample in enumerate(samples) if wanted_all or sample.active]
    out = list(samples)
    if reference.is_policy():
        for index in wanted:
            out[index] = replace(samples[index], ref_is_old=True)
    elif wanted:
        for index, logp in zip(wanted, reference.logprobs([samples[index] for index in wanted]), strict=True):
            out[index] = replace(samples[index], ref_logp=logp, ref_mode=reference.logp_mode)
    return out
