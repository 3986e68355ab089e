"""How a configuration file becomes a mapping, and a mistake in it one line: YAML, includes, overrides, remedies."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from owpo_megatron.errors import UserError


class Section(BaseModel):
    """A block of the file: strict, frozen, its fields documented below each."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def read_mapping(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's mapping, on top of the file that it includes, with `dotted.field=value` overrides (values are YAML).

    `include: OTHER.yaml` (relative to the file that says so) takes another file first: sections are merged field by
    field, everything else is replaced. Inside a section the other file becomes that section.

    Raises:
        UserError: a file is missing, not YAML, not a mapping, or includes itself; an override is ill-formed.
    """
    raw = _read(path, ())
    for override in overrides:
        apply_override(raw, override)
    return raw


def first_mistake(error: ValidationError, root: type[BaseModel]) -> UserError:
    """The first of pydantic's complaints about a `root`, as the field, the value and the remedy."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return cause
    dotted = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        return UserError(dotted, first["input"], "unknown field; " + _suggestion(first["loc"], root))
    if first["type"] == "missing":
        return UserError(dotted, "(missing)", "required; add it to the config or pass it as an override")
    return UserError(dotted, first["input"], first["msg"][0].lower() + first["msg"][1:])


def _read(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    field = "include" if including else "config"
    if not path.is_file():
        raise UserError(field, path, "no such file; give an existing YAML file" + ("" if including else " with -c"))
    if path.resolve() in including:
        raise UserError(field, path, f"{including[-1]} includes it again; a file cannot include itself")
    try:
        raw = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(field, path, f"not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(field, path, "must hold a mapping of sections, e.g. `model: {path: ...}`")
    return _with_includes(raw, path.parent, (*including, path.resolve()))


def _with_includes(section: dict[str, Any], folder: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    own = {
        name: _with_includes(value, folder, including) if isinstance(value, dict) else value
        for name, value in section.items()
        if name != "include"
    }
    return _merged(_read(folder / str(section["include"]), including), own) if "include" in section else own


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in top.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = _merged(out[name], value) if both else value
    return out


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one field, `dotted.field=value`, in a plain mapping. Raises UserError where it is ill-formed."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError("override", override, "write it as dotted.field=value, e.g. parallel.tp=2")
    *parents, leaf = dotted.split(".")
    node = raw
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(dotted, text, f"{name} is a value in the file, not a section")
    node[leaf] = yaml.safe_load(text)


def _suggestion(loc: tuple[Any, ...], root: type[BaseModel]) -> str:
    section: Any = root
    for name in loc[:-1]:
        if isinstance(name, str):  # a number is a place in a list of sections
            section = section.model_fields[name].annotation
            section = next(iter(get_args(section)), section)
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
