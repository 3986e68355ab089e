"""The rules by name. A rule judges one response and returns a reason, or a Judgement with a graded reward; it may
hang, exhaust memory or crash.

A rule is a pure function. The trivial ones take time linear in the response, so they are graded in process; the others
go to worker processes that can be killed, after the rule's `quick` part, if it has one.
"""

from __future__ import annotations

from collections.abc import Callable

from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Judgement, VerdictReason
from owpo_megatron.verifiers.code import CodeRule
from owpo_megatron.verifiers.dapo import grade_dapo, grade_dapo_strict_box
from owpo_megatron.verifiers.ensemble import EnsembleRule
from owpo_megatron.verifiers.external import HttpRule, PythonRule
from owpo_megatron.verifiers.generated_tasks import grade_cipher, grade_countdown, grade_sums
from owpo_megatron.verifiers.judge import JudgeRule
from owpo_megatron.verifiers.math_answer import MathRule
from owpo_megatron.verifiers.one_value import grade_gsm8k, grade_multiple_choice

Rule = Callable[[GradingItem], "VerdictReason | Judgement"]

TRIVIAL_RULES: dict[str, Rule] = {
    "cipher": grade_cipher,
    "countdown": grade_countdown,
    "dapo": grade_dapo,
    "dapo_strict_box": grade_dapo_strict_box,
    "gsm8k": grade_gsm8k,
    "lookup": grade_cipher,
    "multiple_choice": grade_multiple_choice,
    "sums": grade_sums,
}
HEAVY_RULES: dict[str, Rule] = {
    "math": MathRule(),
    "math_any_symbols": MathRule(strict=False),
    "code": CodeRule(),
}
RULE_NAMES = (*HEAVY_RULES, *TRIVIAL_RULES)
TASK_RULES = ("cipher", "countdown", "lookup", "sums")  # a domain of this name is the generated task


def find_rule(name: str, proxy: bool = False) -> Rule:
    """The rule of this name, `judge:FILE`, `ensemble:FILE`, `python:module:function`, or an http(s) URL.

    Imports sympy only in workers.

    Args:
        proxy: a URL is reached through the environment's proxy.

    Raises:
        UserError: there is no such rule, module or function.
    """
    if name in TRIVIAL_RULES:
        return TRIVIAL_RULES[name]
    if name in HEAVY_RULES:
        return HEAVY_RULES[name]
    if name.startswith(("http://", "https://")):
        return HttpRule(name, proxy=proxy)
    kind, _, target = name.partition(":")
    if kind == "ensemble" and target:
        return EnsembleRule.read(target, proxy)
    if kind == "judge" and target:
        return JudgeRule.read(target, proxy)
    module, _, function = target.rpartition(":")
    if kind == "python" and module and function:
        return PythonRule(module, function).check()
    known = ", ".join(("auto", *RULE_NAMES))
    remedy = f"use one of {known}, judge:FILE.yaml, ensemble:FILE.yaml, python:module:function, or an http(s) URL"
    raise UserError("verifier.rule", name, remedy)


def quick_part(rule: Rule) -> Callable[[GradingItem], VerdictReason | Judgement | None] | None:
    """The part of a rule that may run in the caller's process: all of a trivial one, string comparison of `math`."""
    return rule if rule in TRIVIAL_RULES.values() else getattr(rule, "quick", None)


def rule_of_domain(domain: str) -> str:
    """The rule that grades a domain: a task's own, `math` for all others (files choose their domain names freely)."""
    return domain if domain in TASK_RULES else "math"
