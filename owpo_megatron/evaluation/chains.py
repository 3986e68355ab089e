"""CoT-Pass@k: a second rule has to accept the reasoning of a right response as well.

Pass@k counts a right answer however it was reached; with a large k it rewards guessing. CoT-Pass@k is the same
estimator over the responses whose answer is right and whose chain of thought is accepted.

Source: arXiv:2506.14245. The paper asks a language model several times and reports three ways to count its votes; here
one rule is asked once: `judge:FILE.yaml`, an endpoint, a function, or an ensemble, whose minimum is "all of them".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from owpo_megatron.config import VerifierConfig
from owpo_megatron.config.verifier import own_rule
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.evaluation.sets import EvalSet
from owpo_megatron.types import GradingItem, Verdict, Verdicts, Verifier
from owpo_megatron.verifiers import make_verifier
from owpo_megatron.verifiers.rules import find_rule

FIELD = "eval.chain"


def check_chains(sets: Iterable[EvalSet], proxy: bool) -> None:
    """Find the rules that judge reasoning, before an engine starts.

    Raises:
        UserError: one is a built-in rule, which judges answers alone, or does not exist.
    """
    for rule in dict.fromkeys(one.chain for one in sets if one.chain):
        try:
            find_rule(own_rule(rule), proxy)
        except UserError as error:
            field = FIELD if error.field == "verifier.rule" else error.field  # a field of a judge's file stays
            raise UserError(field, error.value, error.remedy) from error
        except ValueError as error:
            raise UserError(FIELD, rule, str(error)) from error


def chain_verifier(config: VerifierConfig, sets: Iterable[PreparedSet]) -> Verifier | None:
    """The verifier of the reasoning, with the limits of the section `verifier`; None: no set asks for one."""
    rules = {domain: one.spec.chain for one in sets if one.spec.chain for domain in one.rules}
    return make_verifier(config, (), rules) if rules else None


class ChainGrading:
    """Verdicts of some responses, then those of the reasoning of the right ones.

    Args:
        items: what a rule gets of the responses.
        verifier: grades the answers.
        chains: grades the reasoning; None: nobody does.
    """

    def __init__(self, items: Sequence[GradingItem], verifier: Verifier, chains: Verifier | None):
        self._items = items
        self._answers = verifier.submit(items)
        self._chains = chains
        self._reasoning: Verdicts | None = None  # of the right ones, once they are known

    def proceed(self, wait: bool = False) -> None:
        """Hand over the right responses as soon as all answers are graded, or when they are."""
        if self._chains is not None and self._reasoning is None and (wait or self._answers.done()):
            pairs = zip(self._items, self._answers.result(), strict=True)
            self._reasoning = self._chains.submit([item for item, verdict in pairs if verdict.correct])

    def done(self) -> bool:
        """`result` would return at once."""
        if self._chains is None:
            return self._answers.done()
        return self._reasoning is not None and self._reasoning.done()

    def result(self) -> list[tuple[Verdict, Verdict | None]]:
        """Wait for the verdicts: of each answer, and of the reasoning where the answer is right and it is graded."""
        self.proceed(wait=True)
        reasoning = iter(self._reasoning.result() if self._reasoning is not None else ())
        return [
            (answer, next(reasoning) if answer.correct and self._reasoning is not None else None)
            for answer in self._answers.result()
        ]
