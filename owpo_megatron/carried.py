"""Objects of a notebook or a script that a configuration names and no import finds.

`python:MODULE:NAME` in a configuration is an import in general. An object of `__main__`, or one inside a function,
exists in one process only; `carry` makes it known there by such a name, so that every place that resolves names finds
it. Other processes get it by value (api/given.py). Elsewhere the name resolves to nothing, and is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PREFIX = "python:"
_objects: dict[str, Any] = {}


@contextmanager
def carry(objects: Mapping[str, Any]) -> Iterator[None]:
    """Make objects known by their names, `python:MODULE:NAME`, inside the block."""
    before = dict(_objects)
    _objects.update(objects)
    try:
        yield
    finally:
        _objects.clear()
        _objects.update(before)


def carried() -> dict[str, Any]:
    """Those objects, by name."""
    return dict(_objects)


def is_carried(name: str) -> bool:
    return name in _objects


def find_object(module: str, attribute: str) -> Any:
    """The object that `python:MODULE:ATTRIBUTE` names.

    Raises:
        ImportError, AttributeError: there is none.
    """
    name = f"{PREFIX}{module}:{attribute}"
    if name in _objects:
        return _objects[name]
    return getattr(importlib.import_module(module), attribute)
