"""From groups to annotated minibatches: advantages, the active-sample curriculum, old and reference log-probs.

Passes that need not run are not run: the old policy's with one update a step (it is the policy itself), the
reference's while it has the policy's weights, and the reference's on samples that are not active.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from owpo_megatron.config import AlgorithmConfig
from owpo_megatron.methods import Method, group_advantages, num_active, top_active
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.types import Group, Policy, Reference, Sample, StepLog


class BatchBuilder:
    """Implements Batches. Pure but for the log-prob passes, which are collective.

    Args:
        config: the section `algorithm`.
        group_size: siblings of a prompt, G.
        updates: minibatches per step, `optimizer.updates_per_step`.
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        group_size: int,
        updates: int,
        rules: RewardRules,
        stages: StagePlan,
        method: Method,
        policy: Policy,
        reference: Reference,
    ):
        self._algorithm = config
        self._group_size = group_size
        self._updates = updates
        self._rules = rules
        self._stages = stages
        self._method = method
        self._policy = policy
        self._reference = reference

    def prepare(self, groups: Sequence[Group], step: int, log: StepLog) -> Iterator[list[Sample]]:
        """The step's minibatches, one after the other, with the log-probs that the method needs.

        All passes run before the first minibatch is handed out: old and reference are those of the step's start.
        A minibatch is passed through the model in the same packs as in its update, so that its first ratio is
        exactly 1 where the weights are the same.
        """
        version, method = self._reference.version, self._method
        log.add(stage=self._stages.stage(step), n_active=self.num_active(step))
        log.add(ref_id=version.ref_id, ref_step=version.source_step)
        minibatches = self._split(self.samples(groups, step))
        if method.needs_old and len(minibatches) > 1:
            with log.timed("logp_old"):
                minibatches = [_with_old(samples, self._policy) for samples in minibatches]
        if method.needs_reference != "none":
            with log.timed("logp_ref"):
                wanted_all = method.needs_reference != "active"
                minibatches = [_with_reference(samples, self._reference, wanted_all) for samples in minibatches]
        yield from minibatches

    def num_active(self, step: int) -> int:
        """Active samples of a group: the curriculum's, or all."""
        if not self._algorithm.curriculum:
            return self._group_size
        return num_active(self._stages.step_in_stage(step), self._stages.stage_steps(step), self._group_size)

    def samples(self, groups: Sequence[Group], step: int) -> list[Sample]:
        """All siblings in submission order, with advantages and the active ones marked; ties of |A| go to the lower
        submission index."""
        n_active = self.num_active(step)
        return [sample for group in groups for sample in self._group_samples(group, n_active)]

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
