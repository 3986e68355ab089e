"""Annotate groups and split them into minibatches: advantages, active samples, old and reference log-probs.

Passes that need not run are not run: the old policy's with one update per step (it is the policy itself), the
reference's while it has the policy's weights, and the reference's on samples that are not active.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from owpo_megatron.config import AlgorithmConfig
from owpo_megatron.errors import RunError
from owpo_megatron.methods import Method, StepView, num_active, top_active
from owpo_megatron.methods.prepare import prepared_in_minibatch
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.trainer.schedule import StagePlan
from owpo_megatron.trainer.step_view import checked_advantage, step_view
from owpo_megatron.types import Elsewhere, Group, Policy, Reference, Sample, StepLog, tensor_of


class BatchBuilder:
    """Implements Batches. Pure but for the log-prob passes, which are collective.

    Args:
        config: the section `algorithm`.
        group_size: siblings of a prompt that the rollouts ask for, G.
        updates: minibatches per step, `optimizer.updates_per_step`.
        record: called with (step, groups, their samples with all log-probs) on the rank that has it.
        decode: token ids to text, for methods with `needs_text`.
        steps: length of the run, for `StepView.progress`; None: unknown.
        replays_routing: every sample must have its engine's experts (`rollout.routing_replay`).
        exchange: has the tokens of the groups; None: they come with them, and every rank gets all log-probs.
        recorded: groups per step whose values per token `record` reads.
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
        record: Callable[[int, Sequence[Group], Sequence[Sample]], None] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        steps: int | None = None,
        replays_routing: bool = False,
        exchange: Exchange | None = None,
        recorded: int = 0,
    ):
        self._algorithm = config
        self._group_size = group_size
        self._updates = updates
        self._rules = rules
        self._stages = stages
        self._method = method
        self._policy = policy
        self._reference = reference
        self._record = record
        self._decode = decode
        self._steps = steps
        self._replays_routing = replays_routing
        self._exchange = exchange
        self._recorded = recorded
        self._memory: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory = state["memory"]

    def prepare(self, groups: Sequence[Group], step: int, log: StepLog) -> Iterator[list[Sample]]:
        """The step's minibatches, one after the other, with what the method needs.

        Old and reference log-probs are those of the step's start: their passes run before the first minibatch is
        handed out. What a method with coupling `group` or `minibatch` prepares is of the policy right before the
        minibatch's update.
        A minibatch is passed through the model in the same packs as in its update, so that its first ratio is
        exactly 1 where the weights are the same.
        """
        version, method = self._reference.version, self._method
        log.add(stage=self._stages.stage(step), n_active=self.num_active(step))
        log.add(ref_id=version.ref_id, ref_step=version.source_step)
        if self._replays_routing:
            check_experts(groups)
        bare = [self._at_home(samples) for samples in self._split(_bare(groups))]
        entropies: list[torch.Tensor] = []
        some_keep = any(sample.keeps_old for samples in bare for sample in samples)
        reads_old = method.needs_old or method.tis_cap is not None
        if method.needs_old_entropy or (reads_old and (len(bare) > 1 or some_keep)):
            with log.timed("logp_old"):
                bare, entropies = self._with_old(bare)
        minibatches = self._split(self._judged(groups, [sample for one in bare for sample in one], step, entropies))
        if method.needs_reference != "none":
            with log.timed("logp_ref"):
                wanted_all = method.needs_reference != "active"
                minibatches = [_with_reference(samples, self._reference, wanted_all) for samples in minibatches]
        everything = [sample for minibatch in minibatches for sample in minibatch]
        packed = sum(len(sample.prompt_ids) + len(sample.response_ids) for sample in everything)
        log.add(samples_trained=len(everything), tokens_packed=packed)
        told = self._told(everything)
        if self._record:
            self._record(step, groups, told)
        for index, samples in enumerate(minibatches):
            if method.coupling in ("group", "minibatch"):
                with log.timed("logp_now"):
                    samples = self._prepared(samples, is_first=index == 0)
            yield samples

    def num_active(self, step: int) -> int:
        """Active samples of a group: the curriculum's, or all."""
        if not self._algorithm.curriculum:
            return self._group_size
        return num_active(self._stages.step_in_stage(step), self._stages.stage_steps(step), self._group_size)

    def samples(self, groups: Sequence[Group], step: int) -> list[Sample]:
        """All siblings in submission order, with the method's advantages, and the active ones marked."""
        return self._judged(groups, _bare(groups), step, [])

    def _judged(
        self, groups: Sequence[Group], bare: Sequence[Sample], step: int, entropies: Sequence[torch.Tensor]
    ) -> list[Sample]:
        """The samples with reward, advantage and whether they are active.

        Ties of |A| (of its mean over tokens, where each has its own) go to the lower submission index.
        """
        n_active, samples, waiting = self.num_active(step), [], iter(bare)
        done = step / self._steps if self._steps else 0.0
        view = step_view(self._method, self._rules, groups, bare, entropies, self._decode, done, self._memory)
        deciding = found = self._advantages(groups, view)
        if self._algorithm.active_by == "verifier":
            rewards = [reward for group in groups for reward in group.rewards]
            deciding = self._advantages(groups, replace(view, reward_N=rewards))
        for group, advantages, by_size in zip(groups, found, deciding, strict=True):
            counts, shaped = self._rules.counts(group), self._rules.shaped(group)
            sizes_1G = torch.tensor([[float(torch.as_tensor(one).abs().mean()) for one in by_size]])
            active_1G = top_active(sizes_1G, min(n_active, len(advantages)))
            samples += [
                replace(
                    sample,
                    advantage=sample.spread(one) if isinstance(one := advantages[place], torch.Tensor) else one,
                    active=bool(active_1G[0, place]) and counts[place],
                    masked=not counts[place] or sample.origin == "baseline",
                    reward=shaped[place],
                )
                for place, sample in enumerate(itertools.islice(waiting, len(group.rollouts)))
            ]
        return samples

    def _advantages(self, groups: Sequence[Group], step: StepView) -> list[list[float | torch.Tensor]]:
        """Return the advantage of each sibling of each group; 0 for those that do not count.

        Raises:
            TypeError: the method did not return one number, or one per token, for each sample.
        """
        found = list(self._method.advantages(step))
        if len(found) != len(step.group_N):
            raise TypeError(f"{self._method.name}.advantages returned {len(found)} for {len(step.group_N)} samples")
        out: list[list[float | torch.Tensor]] = [[] for _ in groups]
        for group, inside, length, advantage in zip(step.group_N, step.counts_N, step.length_N, found, strict=True):
            out[group].append(checked_advantage(self._method, advantage, length) if inside else 0.0)
        return out

    def _split(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Whole groups, in submission order, into (at most) `updates` minibatches of nearly equally many groups."""
        groups = [list(siblings) for _, siblings in itertools.groupby(samples, key=lambda sample: sample.group)]
        updates = min(self._updates, len(groups))
        bounds = [index * len(groups) // updates for index in range(updates + 1)] if updates else [0]
        return [sum(groups[start:end], []) for start, end in zip(bounds[:-1], bounds[1:], strict=True)]

    def _with_old(self, minibatches: list[list[Sample]]) -> tuple[list[list[Sample]], list[torch.Tensor]]:
        """The samples with the sampling policy's log-probs, and its entropies where the method asks for them."""
        policy, entropies, out = self._policy, [], []
        for samples in minibatches:
            logps, found, statistics = self._pass_over(samples, self._method.needs_old_entropy)
            if self._method.needs_old_entropy:
                entropies += [one.in_loss(entropy) for one, entropy in zip(samples, found, strict=True)]
            old = [
                self._behaviour(one) if one.keeps_old else logp  # stored responses keep their own
                for one, logp in zip(samples, logps, strict=True)
            ]
            known = zip(samples, old, statistics, strict=True)
            out.append(
                [
                    replace(one, old_logp=logp, old_statistic=statistic, old_mode=policy.logp_mode)
                    for one, logp, statistic in known
                ]
            )
        return out, entropies

    def _at_home(self, samples: list[Sample]) -> list[Sample]:
        """A minibatch's samples, with the data-parallel rank that trains on each and needs its values per token.

        They have none, and every rank gets all values, where the method looks at samples together; their tokens are on
        every rank where the method reads those.
        """
        method = self._method
        together = method.coupling in ("group", "minibatch")
        if self._exchange is None:
            return samples
        if method.needs_tokens or method.needs_text or (together and any(one.keeps_old for one in samples)):
            samples = self._exchange.everywhere(samples)
        if together or method.needs_old_entropy:
            return samples
        homes = self._policy.homes(samples)
        return [replace(sample, home=home) for sample, home in zip(samples, homes, strict=True)]

    def _behaviour(self, sample: Sample) -> torch.Tensor:
        """The engine's log-probs of a sample that has been passed through the policy; no elements on other ranks."""
        behaviour = (self._exchange.here(sample) if self._exchange else sample).behaviour_logp
        return torch.empty(0) if isinstance(behaviour, Elsewhere) else tensor_of(behaviour, torch.float32)

    def _told(self, samples: list[Sample]) -> list[Sample]:
        """The samples, those of the first groups with their log-probs on global rank 0, which records them."""
        count = sum(sample.group < self._recorded for sample in samples)
        if self._exchange is None or not count or all(sample.home is None for sample in samples):
            return samples
        return self._exchange.to_main(samples[:count], ("old_logp", "ref_logp")) + samples[count:]

    def _prepared(self, samples: list[Sample], is_first: bool) -> list[Sample]:
        """Call the method's `prepare` with the log-probs of the current policy.

        Those of a step's first minibatch are the old policy's, whose pass may have run already.
        """
        method = self._method
        known = [sample.old_logp for sample in samples if sample.old_logp is not None]
        is_old = is_first and len(known) == len(samples) and not any(sample.keeps_old for sample in samples)
        if is_old and not method.needs_entropy:
            statistics = [sample.old_statistic for sample in samples if sample.old_statistic is not None]
            return prepared_in_minibatch(method, samples, known, None, samples[0].old_mode, statistics or None)
        logps, entropies, found = self._pass_over(samples, method.needs_entropy)
        statistics = [one for one in found if one is not None]
        mode = self._policy.logp_mode
        return prepared_in_minibatch(method, samples, logps, entropies or None, mode, statistics or None)

    def _pass_over(
        self, samples: list[Sample], wants_entropies: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], Sequence[torch.Tensor | None]]:
        """The policy's log-probs, its entropies ([] where nobody wants them), and the method's own statistic."""
        if self._method.statistic is not None:
            return self._policy.logprobs_and_statistics(samples, self._method.statistic)
        nothing = [None] * len(samples)
        if wants_entropies:
            return *self._policy.logprobs_and_entropies(samples), nothing
        return self._policy.logprobs(samples), [], nothing


def _bare(groups: Sequence[Group]) -> list[Sample]:
    """All siblings in submission order, before anything is made of their rewards."""
    siblings = [(index, rollout) for index, group in enumerate(groups) for rollout in group.rollouts]
    return [
        Sample(
            prompt_ids=rollout.trained_ids or rollout.prompt.token_ids,
            response_ids=rollout.response_ids,
            advantage=0.0,
            active=False,
            behaviour_logp=rollout.behaviour_logp,
            keeps_old=rollout.keeps_old,
            domain=rollout.prompt.domain,
            group=index,
            origin=rollout.origin,
            loss_mask=rollout.loss_mask,
            experts=rollout.experts,
            row=row,
        )
        for row, (index, rollout) in enumerate(siblings)
    ]


def check_experts(groups: Sequence[Group]) -> None:
    """Raise RunError where a response has no experts of an engine, or those of a prompt that it is not trained with."""
    for group in groups:
        for rollout in group.rollouts:
            prompt = rollout.trained_ids or rollout.prompt.token_ids
            tokens = len(prompt) + len(rollout.response_ids) - 1
            if rollout.experts is None or rollout.experts.tokens != tokens:
                found = "no experts" if rollout.experts is None else f"experts of {rollout.experts.tokens} tokens"
                raise RunError(
                    f"rollout.routing_replay: a response (origin {rollout.origin}) to prompt {rollout.prompt.id} has "
                    f"{found}, and {tokens} tokens are trained on; only what the run's own engine drew as a whole has "
                    "them, neither stored nor recorded rollouts: set it to false"
                )


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
