"""Plan of a run and what it may look at: the ledger, the pool, the data's solutions; the audit of its verifier."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterable

from owpo_megatron.config import Config
from owpo_megatron.data import Tokenizer, load_solutions
from owpo_megatron.errors import UserError
from owpo_megatron.methods import Method, make_method
from owpo_megatron.trainer.ledger import PromptLedger, SamplePool
from owpo_megatron.trainer.rollouts import Planning
from owpo_megatron.types import Verifier
from owpo_megatron.verifiers import make_audited
from owpo_megatron.verifiers.audit import AuditedVerifier


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
    if plan.needs_solutions or plan.needs_answers:
        solutions = load_solutions(config.data, tokenizer, rollout.max_response_tokens, date)
        if plan.needs_solutions:
            solutions.check(plan.name)
    return Planning(plan, dynamic, ledger, pool, solutions)


def build_audit(
    config: Config, verifier: Verifier | None, domains: Iterable[str], stack: contextlib.ExitStack
) -> AuditedVerifier | None:
    """The verifier of the training responses with `verifier.audit`; None without one, and on other ranks.

    Args:
        stack: what has to be closed is entered here.
    """
    if verifier is None or config.verifier.audit is None:
        return None
    audited = make_audited(verifier, config.verifier, domains, config.seed)
    stack.callback(audited.close)
    return audited
