"""The verifier of a run: in this process where its rules cannot hang or crash, else a pool of workers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from owpo_megatron.config import VerifierConfig
from owpo_megatron.types import GradingItem, Verdict, Verifier
from owpo_megatron.verifiers.audit import AuditedVerifier
from owpo_megatron.verifiers.code import CodeRule
from owpo_megatron.verifiers.grading import Grading
from owpo_megatron.verifiers.pool import VerifierPool
from owpo_megatron.verifiers.rules import TRIVIAL_RULES, Rule, find_rule, rule_of_domain
from owpo_megatron.verifiers.sandbox import require

SHARE_OF_TIMEOUT = 0.9  # that the rule `code` takes for its tests, before its worker is killed


def make_verifier(
    config: VerifierConfig, domains: Iterable[str], rules_of: Mapping[str, str] | None = None
) -> Verifier:
    """Make the verifier for items of these domains.

    `rule: auto` grades each domain by its own rule, any other value grades all by that one. Worker processes are
    started only if a rule needs them.

    Args:
        domains: domains of all prompts of the run, training and held-out.
        rules_of: domains with a rule of their own, which overrides `rule` (those of evaluation sets).

    Raises:
        UserError: a rule runs programs, and this machine refuses the sandbox that the configuration wants.
    """
    names = {domain: rule_of_domain(domain) if config.rule == "auto" else config.rule for domain in sorted(domains)}
    names |= rules_of or {}
    rules = {domain: find_rule(name, config.proxy) for domain, name in names.items()}
    if "code" in names.values():
        require(config.sandbox)
        own = CodeRule(config.sandbox, SHARE_OF_TIMEOUT * config.timeout)
        rules |= {domain: own for domain, name in names.items() if name == "code"}
    if all(name in TRIVIAL_RULES for name in names.values()):
        return DirectVerifier(rules)
    return VerifierPool(rules, config.workers, config.timeout, memory_bytes=int(config.memory_gb * 2**30))


def make_audited(verifier: Verifier, config: VerifierConfig, domains: Iterable[str], seed: int) -> AuditedVerifier:
    """The verifier with the audit of a configuration; closing it closes both.

    Args:
        verifier: grades the training responses.
        domains: domains of the training prompts.
        seed: the run's seed.
    """
    assert config.audit is not None
    auditor = make_verifier(config.model_copy(update={"rule": config.audit}), domains)
    return AuditedVerifier(verifier, auditor, config.audit_share, seed)


class DirectVerifier:
    """A `Verifier` that grades in this process, for rules that take linear time.

    Args:
        rules: rule of each domain.
    """

    def __init__(self, rules: Mapping[str, Rule]):
        self._rules = dict(rules)

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        return [self._grade(item) for item in items]

    def submit(self, items: Sequence[GradingItem]) -> Grading:
        """Grade as `VerifierPool.submit` does, but at once."""
        grading = Grading(len(items))
        for index, item in enumerate(items):
            grading.put(index, self._grade(item))
        return grading

    def close(self) -> None:
        """Nothing to release."""

    def _grade(self, item: GradingItem) -> Verdict:
        start = time.perf_counter()
        return Verdict.of(self._rules[item.domain](item), time.perf_counter() - start)
