"""Cases of a verifier: gold answer, prediction and, where known, the expected verdict; read from JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers.golds import gold_text, number_text

# Variants of a rule that a case's `config` selects.
_VARIANTS = {("dapo", "rule", "dapo_strict_box"): "dapo_strict_box", ("math", "strict", False): "math_any_symbols"}


@dataclass(frozen=True)
class Case:
    """One line of a case file.

    Example:
        {"id": "a-1", "gold": "42", "prediction": "so \\\\boxed{42}", "form": "response", "expected": true}
    """

    id: str
    item: GradingItem  # its domain is the name of the rule that grades it
    expected: bool | None  # None: unknown, or a matter of policy
    suite: str
    rule_specific: bool  # expected by that suite's own rule, not by mathematics
    limit_s: float | None  # the verdict must be there by then


def read_cases(path: Path, rule: str) -> list[Case]:
    """Read a file of {id, gold, prediction, form: answer|response} lines; further fields are optional.

    Raises:
        UserError: the file is missing, or a line is no such case.
    """
    return [_case(fields, where, rule) for fields, where in _lines(path)]


def read_golds(path: Path, rule: str) -> list[Case]:
    """Make a case of each line {id, answer} of a data set that grades the gold answer against itself.

    This proves that its spelling is read, not that a response would contain it: see `golds.unreadable`.
    """
    cases = []
    for number, (fields, where) in enumerate(_lines(path)):
        gold = number_text(fields.get("answer")) or _text(fields, "answer", where)
        claim = gold_text(gold) if rule in ("math", "math_any_symbols") else gold.rpartition("####")[2].strip()
        response = (
            f"#### {claim}" if rule == "gsm8k" else f"Answer: {claim}" if rule == "dapo" else f"\\boxed{{{claim}}}"
        )
        cases.append(
            Case(str(fields.get("id", number)), GradingItem(response, gold, rule), True, path.stem, False, None)
        )
    return cases


def _lines(path: Path) -> list[tuple[dict[str, Any], str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError("cases", path, f"name a readable file of JSON lines ({reason})") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(where, line[:60], f"write one JSON object per line ({error})") from error
        if not isinstance(fields, dict):
            raise UserError(where, line[:60], "write one JSON object per line")
        found.append((fields, where))
    if not found:
        raise UserError("cases", path, "holds no records; write one JSON object per line")
    return found


def _case(fields: Mapping[str, Any], where: str, rule: str) -> Case:
    form = fields.get("form", "response")
    if form not in ("answer", "response"):
        raise UserError(f"{where} form", form, "use `answer` or `response`")
    prediction = fields.get("prediction")
    if prediction is None and isinstance(fields.get("prediction_expr"), dict):
        parts = fields["prediction_expr"]  # keeps files of very long answers small
        prediction = parts["pre"] + parts["unit"] * parts["n"] + parts["post"]
    if not isinstance(prediction, str):
        raise UserError(f"{where} prediction", prediction, "give the response or the answer as a string")
    config = fields.get("config") or {}
    for (of_rule, key, value), variant in _VARIANTS.items():
        if rule == of_rule and config.get(key) == value:
            rule = variant
    gold = _text(fields, "gold", where)
    limit = fields.get("limit_s")
    return Case(
        id=str(fields.get("id", where)),
        item=GradingItem(prediction, gold, rule, form=form, prompt=str(fields.get("prompt") or "")),
        expected=fields.get("expected"),
        suite=str(fields.get("suite", "all")),
        rule_specific=bool(fields.get("rule_specific", False)),
        limit_s=None if limit is None else float(limit),
    )


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where} {name}", value, "give it as a string")
    return value
