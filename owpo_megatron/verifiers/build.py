"""Choose the verifier of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from owpo_megatron.config import VerifierConfig
from owpo_megatron.types import Verifier
from owpo_megatron.verifiers.direct import DirectVerifier
from owpo_megatron.verifiers.pool import VerifierPool
from owpo_megatron.verifiers.rules import TRIVIAL_RULES, find_rule, rule_of_domain


def make_verifier(
    config: VerifierConfig, domains: Iterable[str], rules_of: Mapping[str, str] | None = None
) -> Verifier:
    """A verifier for items of these domains.

    `rule: auto` grades each domain by its own rule, any other value grades all by that one. Worker processes are
    started only if a rule needs them.

    Args:
        domains: of every prompt of the run, training and held-out.
        rules_of: domains with a rule of their own, whatever `rule` says (those of evaluation sets).
    """
    names = {domain: rule_of_domain(domain) if config.rule == "auto" else config.rule for domain in sorted(domains)}
    names |= rules_of or {}
    rules = {domain: find_rule(name) for domain, name in names.items()}
    if all(name in TRIVIAL_RULES for name in names.values()):
        return DirectVerifier(rules)
    return VerifierPool(rules, config.workers, config.timeout, memory_bytes=int(config.memory_gb * 2**30))
