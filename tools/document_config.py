#!/usr/bin/env python3
"""Write docs/configuration.md from the configuration's classes: every field with its type, bounds, default and meaning.

.venv/bin/python tools/document_config.py          # writes the page; a test fails while it is out of date
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from owpo_megatron.config import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

Every field of a run's YAML file, written by `tools/document_config.py` from the classes in `owpo_megatron/config/`.
Only `model.path` and `data.source` are required. On a command line a field is `section.field=VALUE`; values are YAML.
`include: OTHER.yaml`, at the top of a file or inside a section, reads another file first. The run folder's
`config.yaml` has every default spelled out.
"""
WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "true, false", "Path": "path", "date": "date",
    "Any": "anything"}  # fmt: skip
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥"}


def page() -> str:
    """Text of docs/configuration.md."""
    top = [name for name, field in Config.model_fields.items() if section_of(field.annotation) is None]
    parts = [INTRODUCTION, "## The run\n", table(Config, top)]
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            continue
        heading = f"## `{name}`\n"
        note = f"A list of sections. {field.description or ''}".strip() if is_list(field.annotation) else ""
        about = own_docstring(section)
        parts += [heading, *(f"{text}\n" for text in (note, about) if text), table(section, list(section.model_fields))]
        for inner_name, inner in section.model_fields.items():
            part = section_of(inner.annotation)
            if part is not None:
                about = own_docstring(part)
                parts += [f"### An entry of `{name}.{inner_name}`\n", *([f"{about}\n"] if about else [])]
                parts += [table(part, list(part.model_fields))]
    return "\n".join(parts).rstrip("\n") + "\n"


def table(section: type[BaseModel], names: list[str]) -> str:
    rows = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name in names:
        field = section.model_fields[name]
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{name}` | {value_of(field)} | {default_of(field)} | {escape(meaning)} |")
    return "\n".join(rows) + "\n"


def value_of(field: FieldInfo) -> str:
    """Type and bounds, e.g. "integer > 0" or "`a`, `b`"."""
    text = ", ".join([type_of(field.annotation), *bounds(field.metadata)])
    text = text.replace(", >", " >", 1).replace(", ≥", " ≥", 1)
    return escape(text + (" or null" if type(None) in get_args(field.annotation) else ""))


def type_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([type_of(arguments[0]), *bounds(arguments[1:])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_of(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {type_of(arguments[0])}"
    if origin is dict:
        return f"mapping to {type_of(arguments[1])}"
    if section_of(annotation) is not None:
        return "sections"
    return WORDS[getattr(annotation, "__name__", "Any")]


def bounds(metadata: Any) -> Iterator[str]:
    for constraint in metadata:
        for attribute, sign in BOUNDS.items():
            bound = getattr(constraint, attribute, None)
            if bound is not None:
                yield f"{sign} {bound}"


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return "empty"
    if isinstance(value, Path):
        return f"`{value}`"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip().strip("'")
    return f"`{text}`"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section's class of a field, or of a list's elements; None for a plain value."""
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def own_docstring(section: type[BaseModel]) -> str:
    return " ".join((section.__dict__.get("__doc__") or "").split())


def escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
