"""Where problems come from: a generated task, a JSON-lines file or a Parquet file.

Two record schemas are understood in files. Ours: `{problem, answer}` with optional `id` and `domain`; other fields are
ignored. DAPO-Math-17k's: `{prompt: [{role, content}], reward_model: {ground_truth}, extra_info: {index}}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from owpo_megatron.config import DataConfig
from owpo_megatron.data.problem import Problem, Split
from owpo_megatron.data.tasks import get_task
from owpo_megatron.data.templates import apply_template
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt

DEFAULT_DOMAIN = "math"  # of a record in a file that does not say


@dataclass(frozen=True)
class SourceReport:
    """What became of a source's records.

    Example:
        SourceReport(source="dapo.jsonl", read=17895, repeated=980, contradictory=30, too_long=12, used=16873,
                     contradictory_ids=("dapo-00035", "dapo-00179"))
    """

    source: str
    read: int  # records in the source
    repeated: int = 0  # left out: the same problem with the same answer came before
    contradictory: int = 0  # left out: the problem also stands there with another answer
    too_long: int = 0  # left out: more tokens than data.max_prompt_tokens
    used: int = 0  # after all that and data.limit
    contradictory_ids: tuple[str, ...] = ()  # the first few

    def __str__(self) -> str:
        left_out = [
            f"{count} {what}"
            for count, what in (
                (self.repeated, "repeated"),
                (self.contradictory, "with contradictory answers"),
                (self.too_long, "too long"),
            )
            if count
        ]
        return f"{self.source}: {self.used} of {self.read} problems" + (
            f" (left out: {', '.join(left_out)})" if left_out else ""
        )


def load_prompts(
    config: DataConfig, tokenizer: Tokenizer, split: Split = "train", limit: int | None = None
) -> tuple[list[Prompt], SourceReport]:
    """Prompts of a run: training ones from `data.source`, test ones from `data.eval_source` or the task's own split.

    Args:
        limit: of the test split (`eval.limit`); the train split has `data.limit`.

    Raises:
        UserError: the source cannot be read, a record is faulty, there is no test split, or nothing is left.
    """
    source = config.source if split == "train" else config.eval_source or config.source
    if split == "test" and config.eval_source is None and not config.source.startswith("task:"):
        raise UserError(
            "data.eval_source",
            None,
            f"{config.source} has no test split; name a held-out file, or set eval.before, eval.after and eval.every "
            "to false, false and 0",
        )
    problems, report = load_problems(source, split)
    limit = config.limit if split == "train" else limit
    prompts: list[Prompt] = []
    too_long = 0
    for problem in problems:
        if limit is not None and len(prompts) == limit:
            break
        text = apply_template(config.template, problem.text, tokenizer)
        token_ids = tokenizer.encode(text)
        if len(token_ids) > config.max_prompt_tokens:
            too_long += 1
        else:
            prompts.append(Prompt(problem.id, token_ids, text, problem.answer, problem.domain))
    if not prompts:
        raise UserError(
            "data.max_prompt_tokens", config.max_prompt_tokens, f"no prompt of {source} is that short; raise it"
        )
    return prompts, replace(report, too_long=too_long, used=len(prompts))


def load_problems(source: str, split: Split = "train", limit: int | None = None) -> tuple[list[Problem], SourceReport]:
    """The first `limit` problems of a source, in its order, without repeated and contradictory ones.

    Args:
        source: `task:NAME`, or the path of a .jsonl or .parquet file (which is one split, whatever `split` says).

    Raises:
        UserError: an unknown source or task, a missing or unreadable file, or a faulty record (named file:line).
    """
    if source.startswith("task:"):
        problems = get_task(source.removeprefix("task:")).problems(split)[:limit]
        return problems, SourceReport(source, read=len(problems), used=len(problems))
    path = Path(source)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError("data.source", source, "give `task:NAME`, a .jsonl file or a .parquet file")
    if not path.is_file():
        raise UserError("data.source", source, "no such file")
    records = _jsonl_records(path) if path.suffix == ".jsonl" else _parquet_records(path)
    problems = [_problem(record, place, index) for index, (place, record) in enumerate(records)]
    if not problems:
        raise UserError("data.source", source, "holds no records")
    kept, report = _without_repeats(problems, source)
    kept = kept[:limit]
    return kept, replace(report, used=len(kept))


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield place, json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                shown = line.decode(errors="replace").strip()
                raise UserError(place, _short(shown), f"is not JSON ({error}); one JSON object a line") from error


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    columns = {"id", "problem", "answer", "domain", "prompt", "reward_model", "extra_info"}
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = [name for name in file.schema_arrow.names if name in columns]
        for batch in file.iter_batches(batch_size=4096, columns=known):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("data.source", path, f"cannot be read as Parquet: {_short(str(error))}") from error


def _problem(record: Any, place: str, index: int) -> Problem:
    if not isinstance(record, dict):
        raise UserError(place, _short(record), "must be an object with `problem` and `answer`")
    domain = record.get("domain") or DEFAULT_DOMAIN
    if "prompt" in record and "problem" not in record:
        text = _prompt_text(record["prompt"], place)
        answer = _field(record.get("reward_model"), "ground_truth", place, "reward_model.ground_truth")
        extra = record.get("extra_info")
        name = extra.get("index") if isinstance(extra, dict) else None
    else:
        text = _text(_field(record, "problem", place), place, "problem")
        answer = _field(record, "answer", place)
        name = record.get("id")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    return Problem(
        id=str(index if name is None else name),
        text=text,
        answer=_text(answer, place, "answer"),
        domain=_text(domain, place, "domain"),
    )


def _prompt_text(messages: Any, place: str) -> str:
    """The one user message; the template of the run makes the dialogue, so a record's own system turn has no place."""
    is_dialogue = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_dialogue or [message.get("role") for message in messages] != ["user"]:
        raise UserError(f"{place} prompt", _short(messages), "must be a list of one {role: user, content: text}")
    return _text(messages[0].get("content"), place, "prompt[0].content")


def _field(record: Any, name: str, place: str, shown_name: str | None = None) -> Any:
    shown_name = shown_name or name
    if not isinstance(record, dict) or name not in record:
        raise UserError(place, _short(record), f"lacks `{shown_name}`; add it")
    return record[name]


def _text(value: Any, place: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place} {name}", _short(value), "must be a text that is not empty")
    return value


def _without_repeats(problems: list[Problem], source: str) -> tuple[list[Problem], SourceReport]:
    """Contradictory problems go altogether: no response to one can be called right.

    Texts are the same if they differ in white space only. Looser rules catch more (without punctuation DAPO-Math-17k
    has twice as many contradictions), but they also equate x + 1 with x - 1.
    """
    texts = ["".join(problem.text.split()) for problem in problems]
    answers: dict[str, set[str]] = {}
    for text, problem in zip(texts, problems, strict=True):
        answers.setdefault(text, set()).add(problem.answer.strip())
    kept: list[Problem] = []
    contradictory: list[str] = []
    seen: set[str] = set()
    for text, problem in zip(texts, problems, strict=True):
        if len(answers[text]) > 1:
            contradictory.append(problem.id)
        elif text not in seen:
            seen.add(text)
            kept.append(problem)
    report = SourceReport(
        source,
        read=len(problems),
        repeated=len(problems) - len(kept) - len(contradictory),
        contradictory=len(contradictory),
        contradictory_ids=tuple(contradictory[:10]),
    )
    return kept, report


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
