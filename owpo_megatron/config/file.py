"""Read configuration files: YAML, includes, overrides, and one-line errors with a remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from owpo_megatron.errors import UserError


class Section(BaseModel):
    """Base of all sections: strict and frozen, without infinite or NaN numbers; docstrings document the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def written_as(pattern: str, remedy: str) -> AfterValidator:
    """Validate that a text matches the pattern; the error shows the remedy instead of the pattern."""

    def check(text: str) -> str:
        if not re.search(pattern, text):
            raise ValueError(remedy)
        return text

    return AfterValidator(check)


def read_mapping(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a file with its includes and apply `dotted.field=value` overrides (values are YAML).

    `include: OTHER.yaml` (relative to the including file) reads another file first: sections are merged field by
    field, everything else is replaced. Inside a section the other file provides the fields of that section.

    Raises:
        UserError: a file is missing, not YAML, not a mapping, or includes itself; an override is ill-formed.
    """
    raw = _read(path, ())
    for override in overrides:
        apply_override(raw, override)
    return raw


_REMEDIES = {
    "list_type": "write a list: [a, b]",
    "string_type": "write a text; put it in quotes where YAML reads it as something else",
    "date_from_datetime_parsing": "write a date, as 2026-01-31",
    "date_type": "write a date, as 2026-01-31",
}
"""What to write, for those of pydantic's errors whose own message names no way out."""


def first_mistake(error: ValidationError, root: type[BaseModel]) -> UserError:
    """Convert the first of pydantic's errors about a `root` to field, value and remedy."""
    # an unknown field first: the one that is missing may be the same, misspelled
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    dotted = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        return UserError(dotted, first["input"], "unknown field; " + _suggestion(first["loc"], root))
    if first["type"] == "missing":
        return UserError(dotted, "(missing)", "required; add it to the config or pass it as an override")
    if first["type"] == "model_type":
        return UserError(dotted, first["input"], "is a section: write its fields, {field: value, ...}, or leave it out")
    remedy = _REMEDIES.get(first["type"]) or (str(cause) if cause else first["msg"])
    return UserError(dotted, first["input"], remedy[0].lower() + remedy[1:])


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate fields; plain YAML silently uses the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in names:
            if names.count(name) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{name} appears twice in the mapping that begins in line {line}")
        return super().construct_mapping(node, deep)


def parse_value(text: str, field: str) -> Any:
    """Parse the value of `field=value` on a command line. Raises UserError if it is not YAML."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(field, text, "is not a YAML value; quote it, or close its brackets") from error


def _read(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    field = "include" if including else "config"
    if any(len(part.encode()) > 255 for part in path.parts):
        raise UserError(field, path, "the name is too long for a file; give an existing YAML file")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(field, path, f"{what}; give an existing YAML file" + ("" if including else " with -c"))
    if path.resolve() in including:
        raise UserError(field, path, f"{including[-1]} includes it again; a file cannot include itself")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(field, path, f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(field, path, "must contain a mapping of sections, e.g. `model: {path: ...}`")
    return _with_includes(raw, path.parent, (*including, path.resolve()))


def _with_includes(section: dict[str, Any], folder: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    own = {
        name: _with_includes(value, folder, including) if isinstance(value, dict) else value
        for name, value in section.items()
        if name != "include"
    }
    if "include" not in section:
        return own
    if not isinstance(section["include"], str):
        raise UserError("include", section["include"], "name one file, as a string")
    return _merged(_read(folder / section["include"], including), own)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in top.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = _merged(out[name], value) if both else value
    return out


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one field, `dotted.field=value`, in a plain mapping. Raises UserError if it is ill-formed."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError("override", override, "write it as dotted.field=value, e.g. parallel.tp=2")
    *parents, leaf = dotted.split(".")
    node = raw
    for name in parents:
        if node.get(name) is None:  # a section that is left out, as a resolved file writes it
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise UserError(dotted, text, f"{name} is a value in the file, not a section")
    node[leaf] = parse_value(text, dotted)


def _suggestion(loc: tuple[Any, ...], root: type[BaseModel]) -> str:
    section = root
    for name in loc[:-1]:
        if name in section.model_fields:  # else an index of a list, or a user-defined name
            section = _section_in(section.model_fields[name].annotation) or section
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside an annotation: Section in list[Section], Section | None or dict[str, Section]."""
    if parts := get_args(annotation):
        return next((found for found in map(_section_in, parts) if found), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
