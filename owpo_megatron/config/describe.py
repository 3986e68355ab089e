"""Fields of the configuration in words: type, bounds, default, meaning. For `owpo config` and the reference page."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

WORDS = {"str": "text", "int": "integer", "float": "number", "bool": "true, false", "Path": "path", "date": "date",
    "Any": "anything"}  # fmt: skip
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥"}


def value_of(field: FieldInfo) -> str:
    """Type and bounds, e.g. "integer > 0" or "`a`, `b`"."""
    text = ", ".join([type_of(field.annotation), *bounds(field.metadata)])
    text = text.replace(", >", " >", 1).replace(", ≥", " ≥", 1)
    return text + (" or null" if type(None) in get_args(field.annotation) else "")


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
