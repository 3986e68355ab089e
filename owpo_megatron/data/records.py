"""Convert records to problems: the schemas, other names of columns, and messages that name the line.

A record has a prompt and an answer (docs/data.md):

    prompt   `problem`: a text; `messages` or ShareGPT's `conversations`: turns; `token_ids`; or `prompt`: any of these
    answer   `answer`: a text or a number; or `reward_model: {ground_truth}`, as DAPO-Math-17k and verl have it
    more     `id` or `extra_info: {index}`, and `domain`; for some methods `solution` and `hints`, a text or several
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from owpo_megatron.data.files import short
from owpo_megatron.data.problem import Message, Problem
from owpo_megatron.errors import UserError
from owpo_megatron.verifiers.golds import number_text

_KINDS = {int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
DEFAULT_DOMAIN = "math"  # of a record without one
_PROMPTS = ("problem", "messages", "conversations", "token_ids", "prompt")
HELP = ("solution", "hints")
READ = {*_PROMPTS, "id", "answer", "domain", "reward_model", "extra_info", *HELP}
"""Columns that are read unless `data.columns` names others."""
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"} | {
    role: role for role in ("system", "developer", "user", "assistant", "tool")
}
_OTHER_NAMES = {
    "problem": ("question", "query", "input", "instruction", "text", "Problem", "Question"),
    "answer": ("solution", "target", "label", "final_answer", "expected_answer", "gold", "ground_truth", "Answer"),
}


def problem_of(record: Any, place: str, index: int, columns: Mapping[str, str] | None = None) -> Problem:
    """The problem of a record.

    Args:
        place: where it was read, for messages.
        index: its number in the source, which is its id where it has none.
        columns: our name -> the record's own, as `data.columns`.

    Raises:
        UserError: a field is missing or of the wrong kind; place, value and remedy are named.
    """
    if not isinstance(record, dict):
        raise UserError(place, short(record), "must be an object with `problem` and `answer`")
    fields = _Fields(record, columns or {}, place)
    name, prompt = fields.first(_PROMPTS)
    text, messages, token_ids = _prompt(prompt, place, name)
    if "answer" in fields or not isinstance(record.get("reward_model"), dict):
        answer, answer_name = fields["answer"], "answer"
    else:
        answer, answer_name = record["reward_model"].get("ground_truth"), "reward_model.ground_truth"
        if answer is None:
            raise UserError(place, short(record), "lacks `reward_model.ground_truth`; add it (docs/data.md)")
    extra = record.get("extra_info")
    given = fields["id"] if "id" in fields else extra.get("index") if isinstance(extra, dict) else None
    if isinstance(given, float):  # pandas makes floats of a column with a gap
        given = None if math.isnan(given) else int(given) if given.is_integer() else given
    domain = fields["domain"] if "domain" in fields else DEFAULT_DOMAIN
    return Problem(
        id=str(index) if given is None or given == "" else _text(str(given), place, "id"),
        text=text,
        answer=_answer(answer, place, answer_name),
        domain=_text(str(domain) if type(domain) is int else domain, place, "domain"),
        messages=messages,
        token_ids=token_ids,
    )


def with_help(problem: Problem, record: Any, place: str, columns: Mapping[str, str] | None = None) -> Problem:
    """The problem with its record's solutions and hints, where it has any.

    Raises:
        UserError: one of them is no text.
    """
    fields = _Fields(record, columns or {}, place)
    found: dict[str, tuple[str, ...]] = {}
    for name in HELP:
        value = fields[name] if name in fields else []
        texts = value if isinstance(value, list) else [value]
        found[name] = tuple(_text(one, place, name) for one in texts)
    return replace(problem, solutions=found["solution"], hints=found["hints"])


def guessed_columns(record: Any) -> dict[str, str]:
    """`data.columns` for a record that has its problem or its answer under another known name.

    Example:
        >>> guessed_columns({"question": "1+1", "answer": 2}), guessed_columns({"problem": "1+1", "answer": 2})
        ({'problem': 'question'}, {})
    """
    if not isinstance(record, dict):
        return {}
    has = {
        "problem": any(name in record for name in _PROMPTS),
        "answer": bool({"answer", "reward_model"} & set(record)),
    }
    found = {
        ours: next((name for name in names if name in record), None)
        for ours, names in _OTHER_NAMES.items()
        if not has[ours]
    }
    return {ours: name for ours, name in found.items() if name is not None}


class _Fields:
    """A record's fields by our names."""

    def __init__(self, record: Mapping[str, Any], columns: Mapping[str, str], place: str):
        self._record, self._columns, self._place = record, columns, place

    def __contains__(self, name: str) -> bool:
        return name in self._columns or self._record.get(name) is not None

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns:
            if name not in self._record:
                raise self._lacking(name)
            return self._record[name]
        value: Any = self._record
        if self._columns[name] in self._record:  # a name with a dot in it
            return self._record[self._columns[name]]
        for part in self._columns[name].split("."):
            if not isinstance(value, dict) or part not in value:
                remedy = f"has no column {self._columns[name]}; it has {_names(self._record)}"
                raise UserError(f"{self._place} data.columns.{name}", self._columns[name], remedy)
            value = value[part]
        return value

    def first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        """The first of these fields that is there, those that `columns` names before all others."""
        for name in sorted(names, key=lambda name: name not in self._columns):
            if name in self:
                return name, self[name]
        raise self._lacking(names[0])

    def _lacking(self, name: str) -> UserError:
        if name in self._record:
            return UserError(f"{self._place} {name}", "null", "must be a text that is not empty")
        other = next((one for one in _OTHER_NAMES.get(name, ()) if one in self._record), None)
        if other:
            remedy = f"set data.columns: {{{name}: {other}}}"
        else:
            remedy = f"add it, or name its column with data.columns: {{{name}: ...}}"
        return UserError(self._place, short(self._record), f"lacks `{name}`; it has {_names(self._record)}: {remedy}")


def _names(record: Mapping[str, Any]) -> str:
    names = [str(name) for name in record]
    return short(", ".join(names[:12])) or "no fields"


def _prompt(value: Any, place: str, name: str) -> tuple[str, tuple[Message, ...], tuple[int, ...]]:
    """(text, turns, token ids) of a prompt in any of its forms; one user's turn is a text."""
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list):
        return _text(value, place, name), (), ()
    if not value:
        raise UserError(f"{place} {name}", "[]", "must not be empty")
    if all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        if min(value) < 0:
            raise UserError(f"{place} {name}", min(value), "is no token id; ids begin with 0")
        return " ".join(map(str, value)), (), tuple(value)
    if not all(isinstance(one, dict) for one in value):
        kinds = "a text, a list of {role, content}, or a list of token ids"
        raise UserError(f"{place} {name}", short(value), f"must be {kinds}")
    messages = tuple(_message(one, place, f"{name}[{number}]") for number, one in enumerate(value))
    last = messages[-1]
    if last.role == "assistant" and not last.continued:
        remedy = (
            "the conversation ends with the assistant's turn, which may give the answer away: end it with the user's, "
            'or mark the beginning of a reply with "prefix": true'
        )
        raise UserError(f"{place} {name}", short(last.content), remedy)
    if last.role in ("system", "developer"):
        raise UserError(f"{place} {name}", last.role, "nothing is asked; end the conversation with the user's turn")
    if len(messages) == 1 and last.role == "user":
        return last.content, (), ()
    return "\n\n".join(message.content for message in messages if message.content), messages, ()


def _message(value: Mapping[str, Any], place: str, name: str) -> Message:
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{place} {name}.role", short(role), "use system, user, assistant or tool")
    content = value.get("content", value.get("value"))
    if value.get("tool_calls"):
        raise UserError(f"{place} {name}", "tool_calls", "calls of tools are not read; write the turn as a text")
    if isinstance(content, list):  # parts, as vision models have them
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not parts or None in parts:
            raise UserError(f"{place} {name}.content", short(content), "only parts of type text are read")
        content = "".join(str(part) for part in parts)
    if role != "system" or content:
        content = _text(content, place, f"{name}.content")
    return Message(_ROLES[role], content or "", continued=bool(value.get("prefix")))


def _answer(value: Any, place: str, name: str) -> str:
    """An answer as a text; a number without an exponent, whole ones without a point."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise UserError(
            f"{place} {name}", short(value), "must be one answer; join the parts of one by commas, as a text"
        )
    number = number_text(value)
    if number is None and isinstance(value, float | decimal.Decimal):
        raise UserError(f"{place} {name}", value, "is no number; give the answer, or remove the row")
    if number is not None:
        return number
    return _text(value, place, name)


def _decoded(value: bytes, place: str, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place} {name}", short(value), f"is not UTF-8 ({error}); make it a column of texts"
        ) from error


def _text(value: Any, place: str, name: str) -> str:
    """The one door for every text of a record.

    Raises:
        UserError: it is no text, it is empty, or it holds half of a surrogate pair, which no encoder takes.
    """
    if isinstance(value, bytes):  # texts of a Parquet column that was not marked as such
        value = _decoded(value, place, name)
    if value is not None and not isinstance(value, str):
        remedy = f"must be a text, not {_KINDS.get(type(value), type(value).__name__)}; in JSON, put it in quotes"
        raise UserError(f"{place} {name}", short(value), remedy)
    if value is None or not value.strip():
        raise UserError(
            f"{place} {name}", "null" if value is None else short(value), "must be a text that is not empty"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        remedy = f"character {error.start + 1} is {code}, half of a surrogate pair; replace it or remove the row"
        raise UserError(f"{place} {name}", short(value), remedy) from error
    return value
