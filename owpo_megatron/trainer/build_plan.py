"""Whose plan a run follows, and what the plan may look at: the ledger, the pool, the data's solutions."""

from __future__ import annotations

import datetime

from owpo_megatron.config import Config
from owpo_megatron.data import Tokenizer, load_solutions
from owpo_megatron.errors import UserError
from owpo_megatron.methods import Method, make_method
from owpo_megatron.trainer.ledger import PromptLedger, SamplePool
from owpo_megatron.trainer.rollouts import Planning


def build_planning(config: Config, method: Method, tokenizer: Tokenizer | None, date: datetime.date | None) -> Planning:
    """The plan of a run: its method's own, or that of another one (`rollout.plan`).

    Args:
        tokenizer: None: another rank than global rank 0, which neither asks nor remembers.

    Raises:
        UserError: the plan needs solutions that the data lack, or log-probs of an engine that computes in FP8.
    """
    rollout = config.rollout
    plan = make_method(rollout.plan, **rollout.plan_settings) if rollout.plan else method
    if plan.keeps_old and config.sync.fp8:
        remedy = f"{plan.name} forms ratios with the engine's log-probs, which FP8 makes too coarse; set it to false"
        raise UserError("sync.fp8", True, remedy)
    dynamic = rollout.keeps_mixed_groups(plan)
    if tokenizer is None:
        return Planning(plan, dynamic)
    remembering = next((one for one in (method, plan) if one.keeps_ledger), None)
    ledger = PromptLedger(remembering.forgetting, remembering.first_counts) if remembering else None
    pool = SamplePool(plan.stores_responses) if plan.stores_responses else None
    solutions = None
    if plan.needs_solutions:
        solutions = load_solutions(config.data, tokenizer, rollout.max_response_tokens, date, plan.name)
    return Planning(plan, dynamic, ledger, pool, solutions)
