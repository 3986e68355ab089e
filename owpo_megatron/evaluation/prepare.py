"""Prepare a set: read its records, order options, apply the template, tokenize; assign verifier rules to domains."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.data import Problem, Tokenizer
from owpo_megatron.data.hub import PREFIX, hub_files
from owpo_megatron.data.records import jsonl_records, problem_of
from owpo_megatron.data.tasks import get_task
from owpo_megatron.data.templates import apply_template
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.choices import DOMAIN, as_problem, choice_of, is_choice
from owpo_megatron.evaluation.sets import SUFFIXES, EvalSet
from owpo_megatron.types import Prompt
from owpo_megatron.verifiers.rules import rule_of_domain

Template = str
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_INSTRUCTED = ("boxed", "Answer:")  # a text with one of these contains its own instruction


@dataclass(frozen=True)
class PreparedSet:
    """A set with its prompts."""

    spec: EvalSet
    origin: str  # the file or the name on the hub that it was read from
    prompts: tuple[Prompt, ...]
    rules: Mapping[str, str]  # domain of a prompt -> rule of the verifier

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts and answers, in order."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(f"{prompt.id}\0{prompt.text}\0{prompt.answer}\0".encode())
        return digest.hexdigest()[:16]

    @property
    def complaint(self) -> str | None:
        """Message if the number of problems is not the expected one."""
        expected, found = self.spec.problems, len(self.prompts)
        if expected is None or self.spec.limit is not None or found == expected:
            return None
        return f"{self.origin} has {found} problems; {self.spec.title} has {expected}"


def prepare(spec: EvalSet, source: str, template: Template, tokenizer: Tokenizer, seed: int) -> PreparedSet:
    """Read a set and build its prompts.

    Args:
        source: a .jsonl, .parquet or .csv file, `task:NAME`, or a name on the hub (`hub:...`).
        seed: seed for shuffling answer options.

    Raises:
        UserError: the source is missing or faulty, or the tokenizer lacks what the template needs.
    """
    problems = read_problems(source, seed)[: spec.limit]
    texts = [
        _instructed(problem.text) if template == "chat" and spec.instruct else problem.text for problem in problems
    ]
    # A separate domain: a run's training problems may be graded by another rule.
    domains = [f"eval/{spec.name}/{problem.domain}" for problem in problems]
    prompts = []
    for problem, text, domain in zip(problems, texts, domains, strict=True):
        prompt_text = apply_template(template, text, tokenizer)
        prompts.append(Prompt(problem.id, tokenizer.encode(prompt_text), prompt_text, problem.answer, domain))
    rules = {
        domain: _rule(problem.domain) if spec.rule == "auto" else spec.rule
        for problem, domain in zip(problems, domains, strict=True)
    }
    return PreparedSet(spec, source, tuple(prompts), rules)


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
    return [problem_of(_with_text_answer(record), place, index) for index, (place, record) in enumerate(records)]


def _with_text_answer(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert integer answers that are stored as floats, as in the hub's AMC, to text."""
    answer = record.get("answer")
    return {**record, "answer": str(int(answer))} if isinstance(answer, float) and answer.is_integer() else record


def _rule(domain: str) -> str:
    return DOMAIN if domain == DOMAIN else rule_of_domain(domain)


def _instructed(text: str) -> str:
    return text if any(mark in text for mark in _INSTRUCTED) else f"{text}\n\n{INSTRUCTION}"


def _from_hub(source: str) -> list[Path]:
    try:
        return hub_files(source, "evaluation set")
    except UserError as error:
        remedy = f"{error.remedy}; for a local copy use --data DIR or --set NAME=FILE"
        raise UserError(error.field, error.value, remedy) from error


def _records(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.suffix not in _READERS:
        raise UserError("evaluation set", file, f"name a file that ends in {', '.join(SUFFIXES)}, or task:NAME")
    if not file.is_file():
        raise UserError("evaluation set", file, "no such file")
    for place, record in _READERS[file.suffix](file):
        if not isinstance(record, dict):
            raise UserError(place, type(record).__name__, "must be an object with fields")
        yield place, record


def _csv_records(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8", newline="") as stream:
        for number, record in enumerate(csv.DictReader(stream), start=1):
            yield f"{file} record {number}", record


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("evaluation set", file, f"cannot be read as Parquet: {str(error)[:80]}") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{file}:{number}", record


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": jsonl_records,
    ".parquet": _parquet_records,
    ".csv": _csv_records,
}
