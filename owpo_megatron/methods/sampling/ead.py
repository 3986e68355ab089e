"""EAD: the sampling temperature falls along the response, later and later in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.plan import Ask, PlanView
from owpo_megatron.methods.sampling.base import Sampled


@dataclass(frozen=True)
class Ead(Sampled):
    """Temperature 1 for the first `warmup` tokens, then max(1 + highest - exp(t / (20 d)), lowest) at token t, d =
    min(delay + growth x step, 40000), times rollout.temperature (authors' code, yangalan123/EAD-RLVR, mode negexp).

    Engines have one temperature per request: a response is drawn in pieces of `piece` tokens, each with the temperature
    of its first token. Old log-probs are those at rollout.temperature, as the authors'; algorithm.tis_cap corrects."""

    name = "ead"
    summary = "as GRPO's S; the sampling temperature falls along the response"
    paper = "arXiv:2510.05251"
    takes_episodes = False
    draws_as_policy = False

    highest: float = hyper(1.2, "Temperature after the warm-up tokens.", gt=0)
    lowest: float = hyper(0.1, "Temperature below which it does not fall.", gt=0)
    delay: float = hyper(25.0, "d at the run's beginning: larger, later.", gt=0)
    growth: float = hyper(5.0, "Added to d at each step.", ge=0)
    warmup: int = hyper(10, "First tokens, which are drawn at rollout.temperature.", ge=0)
    piece: int = hyper(64, "Tokens per piece.", ge=1)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        begin, end = self.piece_of(view.round, view.max_tokens)
        if begin >= view.max_tokens:
            return []
        heat = view.temperature * self.temperature(begin, view.step)
        if view.round == 0:
            prompts = view.take(view.prompts_per_step)
            return [Ask(prompt, view.group_size, temperature=heat, max_tokens=end) for prompt in prompts]
        return [
            Ask(rollout.prompt, 1, group=index, extends=place, temperature=heat, max_tokens=end - begin)
            for index, group in enumerate(view.groups)
            for place, rollout in enumerate(group.rollouts)
            if rollout.finish_reason == "length" and len(rollout.response_ids) == begin
        ]

    def piece_of(self, number: int, most: int) -> tuple[int, int]:
        """First token of a piece, and the one after its last."""
        if not self.warmup:
            return number * self.piece, min((number + 1) * self.piece, most)
        if number == 0:
            return 0, min(self.warmup, most)
        return self.warmup + (number - 1) * self.piece, min(self.warmup + number * self.piece, most)

    def temperature(self, token: int, step: int) -> float:
        """Temperature of a token, as a multiple of rollout.temperature."""
        if token < self.warmup:
            return 1.0
        delay = min(self.delay + self.growth * step, 40000.0)
        exponent = min(token / (20 * delay), 50.0)  # beyond, it is at its lowest anyway
        return max(1 + self.highest - math.exp(exponent), self.lowest)
