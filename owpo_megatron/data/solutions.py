"""Solutions and hints of the training problems, for methods that help the policy or learn from experts."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from owpo_megatron.config import DataConfig
from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.data.sources import training_problems
from owpo_megatron.data.templates import PromptTemplate
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt, Rollout

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

    def hints(self, prompt: Prompt) -> Sequence[str]:
        return self.problems[prompt.id].hints

    def solutions(self, prompt: Prompt) -> Sequence[str]:
        return self.problems[prompt.id].solutions

    def hinted(self, prompt: Prompt, hint: str) -> Prompt:
        """The prompt with the hint after its problem, or after the last turn of a conversation.

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
        turns = problem.messages
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


def load_solutions(
    config: DataConfig, tokenizer: Tokenizer, max_tokens: int, date: datetime.date | None, method: str
) -> ProblemSolutions:
    """Read the solutions and hints of the training problems; the answers of a generated task are its solutions.

    Args:
        max_tokens: longest response.
        method: that needs them, for the message.

    Raises:
        UserError: not one problem has a solution or a hint.
    """
    problems, report = training_problems(config, helped=True)
    if len(config.parts) == 1 and config.parts[0].source.startswith("task:"):
        problems = [(source, replace(problem, solutions=(problem.answer,))) for source, problem in problems]
    if not any(problem.solutions or problem.hints for _, problem in problems):
        remedy = f"{method} needs `solution` or `hints` in the records, or data.columns that name them (docs/data.md)"
        raise UserError("data.source", report.source, remedy)
    found = {problem.id: problem for _, problem in problems}
    return ProblemSolutions(found, PromptTemplate.of(config, tokenizer, date), tokenizer, max_tokens)
