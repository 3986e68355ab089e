"""The paper's own numbers (published.json): tables 2 to 6, what of them is an erratum, and which model is meant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError

FILE = Path(__file__).with_name("published.json")
SOURCE = "paper"
AVERAGE = "average"
NOT_STATED = "not stated"  # the checkpoint of Table 3


@dataclass(frozen=True)
class Published:
    """One number of the paper.

    Example:
        Published("table2", "Qwen3-8B-Base", "owpo", "aime24", "pass@1", "best", 44.38)
    """

    table: str
    model: str
    method: str  # in Table 4 with its hyper-parameter: "mopd, alpha 5"
    set: str
    metric: str
    checkpoint: str
    percent: float


@cache
def published() -> tuple[Published, ...]:
    """Every number of Tables 2 to 6, in the paper's order."""
    return tuple(
        Published(name, model, method, column[0], column[1], column[2], percent)
        for name, table in _content()["tables"].items()
        for model, methods in table["rows"].items()
        for method, row in methods.items()
        for column, percent in zip(table["columns"], row, strict=True)
    )


def find_published(model: str, method: str, set: str, metric: str, checkpoint: str) -> Published | None:
    """The paper's number for a cell, from the first table that has it; None where the paper has none.

    A number whose checkpoint the paper does not state counts for the best one.
    """
    for one in published():
        places = ("best",) if one.checkpoint == NOT_STATED else (one.checkpoint,)
        if (one.model, one.method, one.set, one.metric) == (model, method, set, metric) and checkpoint in places:
            return one
    return None


def figure(name: str) -> Mapping[str, Any]:
    """Facts of the paper's text about a figure, whose points are not printed."""
    found: Mapping[str, Any] = _content()["figures"][name]
    return found


def errata(table: str | None = None) -> list[str]:
    """Contradictions in the paper, or in one of its tables."""
    return [one["text"] for one in _content()["errata"] if table is None or table in one["places"]]


def paper_model(name: str, chosen: str | None = None) -> str:
    """The paper's model that a folder's name means: Qwen2.5-Math-7B or Qwen3-8B-Base, in any spelling.

    Args:
        chosen: the user's own answer, which comes first.

    Raises:
        UserError: the name is neither, or the answer is none of the two.

    Example:
        >>> paper_model("qwen3_8b-base-megatron")
        'Qwen3-8B-Base'
    """
    models = list(_content()["models"])
    wanted = _letters(chosen or name)
    found = [model for model in models if _letters(model) in wanted]
    if len(found) == 1:
        return found[0]
    field, value = ("--paper-model", chosen) if chosen else ("model", name)
    raise UserError(field, value, f"the paper has {' and '.join(models)}; choose one: --paper-model {models[0]}")


def method_of(label: str, known: Iterable[str] | None = None) -> str | None:
    """The paper's method in a row's label, e.g. "owpo" in "owpo (two-stage-owpo-s1)"; None where it is none of them."""
    name = label.partition(" (")[0].strip()
    methods = {one.method for one in published()} if known is None else set(known)
    return name if name in methods else None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


@cache
def _content() -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(FILE.read_text())
    return content
