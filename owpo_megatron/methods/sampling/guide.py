"""Guide: hints where all siblings fail, and a ratio that optimises the policy without the hint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, SampleView, Terms
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups, siblings
from owpo_megatron.methods.sampling.base import Sampled
from owpo_megatron.types import Group

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Guide(Sampled):
    """A group that fails throughout is drawn again with the first hint and trained on without it: r = pi(y | q) /
    old(y | q, hint), shaped to r / (r + gamma) without a clip, gamma the 90 % quantile of r over the minibatch's hinted
    tokens (the authors take it over a microbatch). Groups that still agree are dropped. Own tokens: clip 0.2, GRPO's
    advantages, token mean. Source: the authors' code and its run for Qwen (vaskar-open-source-research/guide_rl)."""

    name = "guide"
    summary = "S; r / (r + gamma) A for responses drawn with a hint"
    paper = "arXiv:2506.13923"
    coupling = "minibatch"
    needs_solutions = True
    takes_episodes = False
    keeps_old = True

    quantile: float = hyper(0.9, "Quantile of the hinted tokens' ratios that is gamma.", gt=0, le=1)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round == 0:
            return drawn_groups(view)
        if view.round > 1:
            return []
        assert view.solutions is not None
        asks = []
        for index, group in enumerate(view.groups):
            prompt = view.prompt(index)
            hints = view.solutions.hints(prompt) or view.solutions.solutions(prompt)
            if view.failed(group) and hints:
                hinted = view.solutions.hinted(prompt, hints[0])
                asks.append(Ask(hinted, view.group_size, group=index, trained_on=prompt))
        return asks

    def keep(self, view: PlanView) -> Sequence[Group]:
        last = [siblings(one, range(len(one.rollouts) - view.group_size, len(one.rollouts))) for one in view.groups]
        return [group for group in last if view.is_mixed(group)]

    def prepare(self, samples: Sequence[SampleView]) -> Sequence[Mapping[str, float | torch.Tensor]]:
        import torch

        ratios = [(one.now_logp_L - one.old_logp_L).exp() for one in samples if one.off_policy]
        gamma = float(torch.cat(ratios).quantile(self.quantile).clamp(min=1e-4)) if ratios else 1.0
        return [{"gamma": gamma} for _ in samples]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        own = super().terms(logp_C, batch)
        if batch.off_policy_C is None:
            return own
        ratio_C = (logp_C - batch.old_logp_C).exp()
        shaped_C = ratio_C / (ratio_C + batch.given["gamma"]) * batch.advantage_C
        return Terms(shaped_C.where(batch.off_policy_C, own.value_C), own.metrics)
