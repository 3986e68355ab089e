"""The rules by name. A rule looks at one response and says why it is right or wrong; it may hang, eat memory or crash.

A rule is a pure function. The trivial ones take time linear in a short response, so they are graded in process; the
others go to worker processes that can be killed.
"""

from __future__ import annotations

from collections.abc import Callable

from owpo_megatron.types import GradingItem, VerdictReason
from owpo_megatron.verifiers.cipher import grade_cipher
from owpo_megatron.verifiers.countdown import grade_countdown

Rule = Callable[[GradingItem], VerdictReason]

TRIVIAL_RULES: dict[str, Rule] = {"cipher": grade_cipher, "countdown": grade_countdown}


def find_rule(name: str) -> Rule:
    """The rule of this name; imports sympy only when it is the one for mathematics."""
    if name in TRIVIAL_RULES:
        return TRIVIAL_RULES[name]
    assert name == "math", name
    from owpo_megatron.verifiers.math_answer import grade_math

    return grade_math


def rule_of_domain(domain: str) -> str:
    """The rule that grades a domain: a task's own, `math` for all else (files name domains as they like)."""
    return domain if domain in TRIVIAL_RULES else "math"
