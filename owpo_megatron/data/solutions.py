"""Solutions and hints of the training problems, for methods that help the policy or learn from experts."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from owpo_megatron.config import DataConfig
from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.data.sources import training_problems
from owpo_megatron.data.templates import PromptTemplate
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt, Rollout

ANSWER_MARKS = re.compile(r"\\boxed\{|<answer>\s*|####\s*|\b[Aa]nswer(?:\s+is)?\s*:?\s+")
"""What a response writes before its answer."""
EXPERT_VERSION = -1  # weights that no run has


@dataclass(frozen=True)
class ProblemSolutions:
    """Implements Solutions over the problems of a run.

    Args:
        problems: by the ids of their prompts.
        max_tokens: longest response; a longer solution is cut there.
    """

    problems: Mapping[str, Problem]
    template: PromptTemplate
    tokenizer: Tokenizer
    max_tokens: int

    def check(self, method: str) -> None:
        """Refuse data without a single solution or hint.

        Raises:
            UserError: naming the method that needs them.
        """
        if not any(problem.solutions or problem.hints for problem in self.problems.values()):
            remedy = "has none: add them to the records, or name their columns with data.columns (docs/data.md)"
            raise UserError("algorithm.name", method, f"needs `solution` or `hints`, and the data {remedy}")

    def hints(self, prompt: Prompt) -> Sequence[str]:
        return self.problems[prompt.id].hints

    def solutions(self, prompt: Prompt) -> Sequence[str]:
        return self.problems[prompt.id].solutions

    def hinted(self, prompt: Prompt, hint: str, words: str = "") -> Prompt:
        """The prompt with the hint after its problem, or after the last turn of a conversation.

        Args:
            words: text before the hint.

        With the template `raw` nothing separates problem and response: the hint then begins the response, and is graded
        with it.

        Raises:
            UserError: the problem came as token ids, or the tokenizer does not know the hint's characters.
        """
        problem = self.problems[prompt.id]
        if problem.token_ids:
            raise UserError("data.source", prompt.id, "a tokenized prompt cannot take a hint; give its text")
        if self.template.name == "raw":
            return prompt.begun(self.tokenizer.encode(hint))
        hint, turns = words + hint, problem.messages
        if turns:
            last = turns[-1]
            turns = (*turns[:-1], Message(last.role, f"{last.content}\n\n{hint}", last.continued))
        helped = replace(problem, text=f"{problem.text}\n\n{hint}", messages=turns)
        return self.template.prompt(helped, prompt.domain, prompt.source)

    def expert(self, prompt: Prompt, solution: str) -> Rollout:
        tokens = (*self.tokenizer.encode(solution), self.tokenizer.eos_ids[0])
        ended = len(tokens) <= self.max_tokens
        return Rollout(
            prompt=prompt,
            response_ids=tokens[: self.max_tokens],
            behaviour_logp=(),
            policy_version=EXPERT_VERSION,
            finish_reason="stop" if ended else "length",
            seed=EXPERT_VERSION,
            origin="expert",
        )

    def answer_after(self, prompt: Prompt, solution: str) -> Rollout | None:
        place = solution.rfind(prompt.answer)
        if place < 0:
            return None
        begun = prompt.begun(self.tokenizer.encode(solution[:place])) if place else prompt
        return replace(self.expert(begun, prompt.answer), response_ids=self.tokenizer.encode(prompt.answer))

    def answered(self, rollout: Rollout) -> tuple[Rollout, Rollout] | None:
        text = self.tokenizer.decode(rollout.response_ids)
        marks = list(ANSWER_MARKS.finditer(text))
        if not marks:
            return None
        mark = marks[-1]
        answer = self.tokenizer.encode(rollout.prompt.answer)
        whole, bare = (
            replace(rollout, prompt=rollout.prompt.begun(self.tokenizer.encode(begun)), response_ids=answer)
            for begun in (text[: mark.end()], mark.group())
        )
        return whole, bare


def load_solutions(
    config: DataConfig, tokenizer: Tokenizer, max_tokens: int, date: datetime.date | None
) -> ProblemSolutions:
    """Read the solutions and hints of the training problems.

    The answers of a generated task are its solutions, and their beginnings its hints.

    Args:
        max_tokens: longest response.
    """
    problems, _ = training_problems(config, helped=True)
    if len(config.parts) == 1 and config.parts[0].source.startswith("task:"):
        problems = [(source, _solved(problem)) for source, problem in problems]
    found = {problem.id: problem for _, problem in problems}
    return ProblemSolutions(found, PromptTemplate.of(config, tokenizer, date), tokenizer, max_tokens)


def _solved(problem: Problem) -> Problem:
    """A generated problem, which has an answer alone."""
    answer = problem.answer
    return replace(problem, solutions=(answer,), hints=tuple(answer[:count] for count in range(1, len(answer))))
