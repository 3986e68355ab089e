"""Prepare a set: read its records, order options, apply the template, tokenize; assign verifier rules to domains."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from owpo_megatron.config.evaluation import Instruction
from owpo_megatron.data import Problem, PromptTemplate
from owpo_megatron.data.files import SUFFIXES, records_of, suffix_of
from owpo_megatron.data.hub import PREFIX, hub_files
from owpo_megatron.data.records import problem_of
from owpo_megatron.data.tasks import get_task
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.choices import DOMAIN, as_problem, choice_of, is_choice
from owpo_megatron.evaluation.sets import EvalSet
from owpo_megatron.types import Prompt
from owpo_megatron.verifiers.rules import rule_of_domain

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem."
)
DAPO_BEHIND = 'Remember to put your answer on its own line after "Answer:".'
_INSTRUCTED = ("boxed", "Answer:")  # a text with one of these contains its own instruction


@dataclass(frozen=True)
class PreparedSet:
    """A set with its prompts."""

    spec: EvalSet
    origin: str  # the file or the name on the hub that it was read from
    prompts: tuple[Prompt, ...]
    rules: Mapping[str, str]  # domain of a prompt -> rule of the verifier
    date: str = ""  # that the template printed as today; "" where it prints none
    repeats: int = 0  # records that were left out, since they repeat a problem and its answer

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts and answers, in order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
        return digest.hexdigest()[:16]

    @property
    def complaint(self) -> str | None:
        """Message if the number of problems is not the expected one, or some of them were repeated."""
        expected, found, notes = self.spec.problems, len(self.prompts), []
        if self.repeats:
            notes.append(f"{self.origin}: {self.repeats} records repeat others and are left out")
        if expected is not None and self.spec.limit is None and found != expected:
            notes.append(f"{self.origin} has {found} problems; {self.spec.title} has {expected}")
        return "; ".join(notes) or None


def prepare(spec: EvalSet, source: str, template: PromptTemplate, seed: int) -> PreparedSet:
    """Read a set and build its prompts.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, `task:NAME`, or a name on the hub (`hub:...`).
        seed: seed for shuffling answer options.

    Raises:
        UserError: the source is missing or faulty, or the template cannot take a problem of it.
    """
    every = read_problems(source, seed)
    different = _once(every)
    problems = different[: spec.limit]
    if template.is_chat and spec.instruction != "none":
        problems = [_instructed(problem, spec.instruction) for problem in problems]
    # A domain of its own: a run's training problems may be graded by another rule.
    domains = [f"eval/{spec.name}/{problem.domain}" for problem in problems]
    prompts = [template.prompt(problem, domain) for problem, domain in zip(problems, domains, strict=True)]
    rules = {
        domain: _rule(problem.domain) if spec.rule == "auto" else spec.rule
        for problem, domain in zip(problems, domains, strict=True)
    }
    date = str(template.date or datetime.date.today()) if template.depends_on_date else ""
    return PreparedSet(spec, source, tuple(prompts), rules, date, len(every) - len(different))


def held_out(spec: EvalSet, prompts: Sequence[Prompt], origin: str) -> PreparedSet:
    """Prepare a run's own held-out problems, whose prompts exist already."""
    domains = {prompt.domain for prompt in prompts}
    rules = {domain: rule_of_domain(domain) if spec.rule == "auto" else spec.rule for domain in domains}
    return PreparedSet(spec, origin, tuple(prompts[: spec.limit]), rules)


def read_problems(source: str, seed: int) -> list[Problem]:
    """Read the problems of a source; multiple-choice options are lettered.

    Raises:
        UserError: the source is missing, empty or of an unknown kind, or a record is faulty.
    """
    if source.startswith("task:"):
        return get_task(source.removeprefix("task:")).problems("test")
    files = _from_hub(source) if source.startswith(PREFIX) else [Path(source)]
    records = [pair for file in files for pair in _records(file)]
    if not records:
        raise UserError("evaluation set", source, "contains no records")
    if is_choice(records[0][1]):
        return [as_problem(choice_of(record, place), seed) for place, record in records]
    return [problem_of(record, place, index) for index, (place, record) in enumerate(records)]


def _rule(domain: str) -> str:
    return DOMAIN if domain == DOMAIN else rule_of_domain(domain)


def _once(problems: Sequence[Problem]) -> list[Problem]:
    """The problems without those that repeat text and answer: DAPO's file of AIME 2024 has each of them 32 times."""
    found: dict[tuple[Any, ...], Problem] = {}
    for problem in problems:
        found.setdefault((problem.text, problem.messages, problem.token_ids, problem.answer), problem)
    return list(found.values())


def _instructed(problem: Problem, instruction: Instruction) -> Problem:
    """The problem with an instruction in its last turn; one that has its own stays, as do token ids."""
    if problem.token_ids or any(mark in problem.text for mark in _INSTRUCTED):
        return problem
    if not problem.messages:
        return replace(problem, text=_with_instruction(problem.text, instruction))
    asked = max((place for place, one in enumerate(problem.messages) if one.role == "user"), default=None)
    if asked is None:
        return problem
    messages = list(problem.messages)
    messages[asked] = replace(messages[asked], content=_with_instruction(messages[asked].content, instruction))
    return replace(problem, messages=tuple(messages))


def _with_instruction(text: str, instruction: Instruction) -> str:
    if instruction == "dapo":
        return f"{DAPO_BEFORE}\n\n{text}\n\n{DAPO_BEHIND}"
    return f"{text}\n\n{INSTRUCTION}"


def _from_hub(source: str) -> list[Path]:
    try:
        return hub_files(source, "evaluation set")
    except UserError as error:
        remedy = f"{error.remedy}; for a local copy use --data DIR or --set NAME=FILE"
        raise UserError(error.field, error.value, remedy) from error


def _records(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not suffix_of(file):
        raise UserError("evaluation set", file, f"give a file that ends in {', '.join(SUFFIXES)}, or task:NAME")
    if not file.is_file():
        raise UserError("evaluation set", file, "no such file")
    for place, record in records_of(file, field="evaluation set"):
        if not isinstance(record, dict):
            raise UserError(place, type(record).__name__, "must be an object with fields")
        yield place, record
