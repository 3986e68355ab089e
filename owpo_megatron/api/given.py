"""A method and a verifier given as Python objects: how the configuration records them, and how they reach the ranks.

| object | recorded as | on a rank of another process |
|---|---|---|
| a method of the catalogue | its name | found there, or registered by value where it was registered in Python |
| an importable class or function | python:MODULE:NAME | imported |
| one of `__main__`, a notebook or a function's inside | its name, python:__main__:NAME | by value (cloudpickle) |
| a Verifier object | python:given:CLASS | by value |
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.carried import PREFIX, carry
from owpo_megatron.config import AlgorithmConfig, Config
from owpo_megatron.errors import UserError
from owpo_megatron.methods import Method, catalogue, find_method, register
from owpo_megatron.types import Verifier

GivenMethod = str | type[Method] | Method
GivenVerifier = Callable[[str, str], Any] | Verifier


@dataclass(frozen=True)
class GivenParts:
    """Objects given to a run beside its configuration."""

    methods: tuple[type[Method], ...] = ()  # to register where the ranks are
    objects: tuple[tuple[str, Any], ...] = ()  # functions by the name that the configuration has for them
    verifier: Verifier | None = None

    def write(self, file: Path) -> None:
        """Write a file for ranks in other processes, readable by this user alone.

        Raises:
            UserError: an object cannot be pickled.
        """
        import cloudpickle

        try:
            content = cloudpickle.dumps((sys.path, cloudpickle.dumps(self)))
        except Exception as error:
            names = [*(one.__name__ for one in self.methods), *(name for name, _ in self.objects)]
            what = ", ".join(names) or type(self.verifier).__name__
            remedy = f"cannot be sent to the ranks ({error}); put it into a module, or train with one rank"
            raise UserError("method or verifier", what, remedy) from error
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_bytes(content)

    @classmethod
    def read(cls, file: Path) -> GivenParts:
        """Read what `write` wrote; the writer's import path is added behind this process's own."""
        path, pickled = pickle.loads(file.read_bytes())
        sys.path.extend(entry for entry in path if entry not in sys.path)
        return pickle.loads(pickled)

    @contextlib.contextmanager
    def known(self) -> Iterator[None]:
        """The names that the configuration has for these objects resolve inside the block; methods stay registered."""
        for method in self.methods:
            register(method)
        with carry(dict(self.objects)):
            yield


def with_given(
    raw: dict[str, Any], method: GivenMethod | None, verifier: GivenVerifier | None
) -> tuple[Config, GivenParts]:
    """The configuration with these in it, and what has to travel with it.

    Args:
        raw: the configuration as a mapping.
        method: replaces the name and the hyper-parameters of the section `algorithm`; fields that every method has
            stay. An instance brings its own settings.
        verifier: a function (response, answer) -> bool, 1 or 0, or a reason code; or a Verifier.

    Raises:
        UserError: one of them is not what it should be.
    """
    objects: dict[str, Any] = {}
    grader: Verifier | None = None
    if method is not None:
        raw = raw | {"algorithm": _algorithm(raw.get("algorithm") or {}, method)}
    if verifier is not None:
        if hasattr(verifier, "submit") and hasattr(verifier, "score"):
            grader = verifier  # type: ignore[assignment]
            name = f"{PREFIX}given:{_word(type(verifier).__name__)}"
            objects[name] = verifier.score
        elif callable(verifier):
            name, importable = _name_of(verifier)
            if not importable:
                objects[name] = verifier
        else:
            remedy = "give a function (response, answer) -> bool, or an object with score, submit and close"
            raise UserError("verifier", verifier, remedy)
        raw = raw | {"verifier": (raw.get("verifier") or {}) | {"rule": name}}
    with carry(objects):
        config = Config.build(raw)
    return config, GivenParts(_registered(config), tuple(objects.items()), grader)


def _algorithm(section: dict[str, Any], method: GivenMethod) -> dict[str, Any]:
    common = {name: value for name, value in section.items() if name in AlgorithmConfig.model_fields}
    if isinstance(method, str):
        return common | {"name": method}
    chosen = method if inspect.isclass(method) else type(method)
    if not issubclass(chosen, Method):
        remedy = "give the name of a method, a subclass of owpo_megatron.Method, or an instance of one"
        raise UserError("method", method, remedy)
    settings: dict[str, Any] = {}
    if not inspect.isclass(method):
        settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return (
        common | {name: value for name, value in settings.items() if value is not None} | {"name": _method_name(chosen)}
    )


def _method_name(chosen: type[Method]) -> str:
    """Name of the class in the catalogue; an importable class need not be registered."""
    if catalogue().get(chosen.name) is chosen:
        return chosen.name
    name, importable = _name_of(chosen)
    if importable:
        return name
    register(chosen)
    return chosen.name


def _registered(config: Config) -> tuple[type[Method], ...]:
    """The run's method where it was registered in Python: ranks of other processes do not know it."""
    name = config.algorithm.name
    if name.startswith(PREFIX):
        return ()
    found = find_method(name)
    return () if found.__module__.startswith("owpo_megatron.methods.") else (found,)


def _name_of(thing: Any) -> tuple[str, bool]:
    """(python:MODULE:NAME, whether importing that gives the object)."""
    module = getattr(thing, "__module__", None) or "__main__"
    name = getattr(thing, "__qualname__", None) or type(thing).__name__
    if module != "__main__" and name.isidentifier():
        with contextlib.suppress(ImportError):
            if getattr(importlib.import_module(module), name, None) is thing:
                return f"{PREFIX}{module}:{name}", True
    return f"{PREFIX}__main__:{_word(name)}", False


def _word(name: str) -> str:
    """A name as the configuration takes it."""
    return re.sub(r"\W+", "_", name).strip("_") or "given"
