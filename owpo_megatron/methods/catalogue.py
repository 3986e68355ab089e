"""The methods by name: this room's files, those registered in Python, and those of installed packages.

The one table: the configuration, `owpo methods`, docs/methods.md and the tests read it. Imports no torch. A method from
outside is imported when its name is asked for, or when all are listed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar, get_args

from owpo_megatron.carried import find_object
from owpo_megatron.errors import UserError
from owpo_megatron.methods.hyper import hyper_parameters
from owpo_megatron.methods.method import Coupling, Divisor, Groups, Kind, Method, Refresh

GROUP = "owpo.methods"
"""Entry-point group: a package's `name = "module:Class"` there makes that method known wherever it is installed."""
COMMON = ("name", "curriculum", "active_by", "advantage_std", "divide_by", "tis_cap", "entropy_coef")
"""Fields of the section `algorithm:` that every method has; a hyper-parameter cannot take their names."""

_CHOICES = {"kind": Kind, "coupling": Coupling, "divisor": Divisor, "groups": Groups, "refresh": Refresh}

MethodClass = TypeVar("MethodClass", bound=type[Method])

_registered: dict[str, type[Method]] = {}


class MethodSettings(Protocol):
    """The section `algorithm:` of a configuration."""

    @property
    def name(self) -> str: ...

    def settings(self) -> Mapping[str, Any]:
        """Fields of the method that were set, by name."""


def register(method: MethodClass) -> MethodClass:
    """Make a method known by its name; also a decorator. Registering the same class again replaces it.

    Raises:
        UserError: the class declares something wrong, or its name is taken.

    Example:
        @register
        @dataclass(frozen=True)
        class Mine(Method):
            name = "mine"
            ...
    """
    check_declaration(method)
    known = _built_in().get(method.name) or _registered.get(method.name)
    if known is not None and _identity(known) != _identity(method):
        raise UserError("method", method.name, f"{_identity(known)} has this name; give {_identity(method)} another")
    _registered[method.name] = method
    return method


def catalogue() -> dict[str, type[Method]]:
    """Every method that is known, by name in alphabetical order.

    Raises:
        UserError: an installed package declares a method wrongly, or under a name that is taken.
    """
    found = _built_in() | _registered
    for name, entry_point in _entry_points().items():
        method = _load(entry_point)
        if name in found and found[name] is not method:
            raise UserError("method", name, f"both {_identity(found[name])} and {entry_point.value} have this name")
        found[name] = method
    return dict(sorted(found.items()))


def find_method(name: str, field: str = "algorithm.name") -> type[Method]:
    """The class of the method `name`, or the class at `python:MODULE:CLASS`.

    Raises:
        UserError: there is none, with the closest name; or its class declares something wrong.
    """
    if name.startswith("python:"):
        return _from_python(name, field)
    found = _built_in().get(name) or _registered.get(name)
    outside = _entry_points().get(name)
    if found is None and outside is not None:
        return _load(outside)
    if found is None:
        known = sorted({*_built_in(), *_registered, *_entry_points()})
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}? " if close else ""
        raise UserError(field, name, f"{remedy}use one of {', '.join(known)}, or python:MODULE:CLASS")
    if outside is not None and _load(outside) is not found:
        raise UserError(field, name, f"both {_identity(found)} and {outside.value} have this name")
    return found


def make_method(chosen: str | type[Method] | MethodSettings, **settings: Any) -> Method:
    """A method with some of its settings changed.

    Args:
        chosen: a name, a class, or the section `algorithm:` of a configuration (with its settings).
        settings: hyper-parameters, and `tis_cap`, `entropy_coef`, `advantage_std`.

    Raises:
        UserError: there is no such method, or it has no such hyper-parameter, or a value is outside its bounds.

    Example:
        >>> make_method("owpo", weight_high=1.5)
        Owpo(clip_low=0.2, clip_high=0.28, weight_low=0.8, weight_high=1.5, weight_policy='current')
    """
    if isinstance(chosen, type):
        check_declaration(chosen)
        method = chosen
    elif isinstance(chosen, str):
        method = find_method(chosen)
    else:
        method, settings = find_method(chosen.name), {**chosen.settings(), **settings}
    common = {field.name for field in dataclasses.fields(Method)}
    own = {name: value for name, value in settings.items() if name not in common}
    checked = check_hyper_parameters(method, own)
    return method(**{name: value for name, value in settings.items() if name in common} | checked)


def check_hyper_parameters(method: type[Method], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in their types.

    Raises:
        UserError: the method has no hyper-parameter of this name, or the value is outside its bounds.
    """
    known = hyper_parameters(method)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"algorithm.{name}", value, _unknown(method, name))
    return {name: known[name].checked(value, f"algorithm.{name}") for name, value in values.items()}


def is_hyper_parameter(name: str) -> bool:
    """Some method of this room has a hyper-parameter of this name."""
    return any(name in hyper_parameters(method) for method in _built_in().values())


def _unknown(method: type[Method], name: str) -> str:
    own = list(hyper_parameters(method))
    having = [other.name for other in catalogue().values() if name in hyper_parameters(other)]
    if having:
        return f"{method.name} has no {name}; leave it out, or use one of {', '.join(having)}"
    close = difflib.get_close_matches(name, [*own, *COMMON], n=1)
    hint = f"did you mean {close[0]}?" if close else f"{method.name} has {', '.join(own) or 'none'}"
    return f"unknown field; {hint}"


def check_declaration(method: Any) -> None:
    """Refuse a class that is not a complete method.

    Raises:
        UserError: naming the class and what is missing.
    """
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise UserError("method", method, "must be a subclass of owpo_megatron.Method")
    for problem in _problems(method):
        raise UserError("method", _identity(method), problem)


def _problems(method: type[Method]) -> list[str]:
    found = []
    if "__dataclass_params__" not in vars(method) or not vars(method)["__dataclass_params__"].frozen:
        found.append("decorate it with @dataclass(frozen=True)")
        return found
    if "name" not in vars(method) or not re.fullmatch(r"[a-z][a-z0-9_]*", str(method.name)):
        found.append("give it a `name` of lower-case letters, digits and underscores")
    if not method.summary or "\n" in method.summary:
        found.append("give it a `summary` of one line")
    for attribute, allowed in _CHOICES.items():
        if getattr(method, attribute) not in get_args(allowed):
            found.append(f"`{attribute}` must be one of {', '.join(get_args(allowed))}")
    if method.terms is Method.terms:
        found.append("write `terms(self, logp_C, batch)`")
    if (method.coupling == "token") != (method.prepare is Method.prepare):
        found.append("`prepare` and a `coupling` other than token go together: declare both or neither")
    common = {field.name for field in dataclasses.fields(Method)}
    for field in dataclasses.fields(method):
        if field.name in common:
            continue
        if field.name in COMMON:
            found.append(f"rename the field {field.name}: every method has one of this name")
        elif "hyper" not in field.metadata:
            found.append(f"declare the field {field.name} with hyper(default, help, bounds)")
        elif type(field.default) not in (bool, int, float, str):
            found.append(f"give the field {field.name} a default of type bool, int, float or str")
        else:
            hyper_parameters(method)[field.name].checked(field.default, f"{method.name}.{field.name}")
    return found


@cache
def _built_in() -> dict[str, type[Method]]:
    """The method classes of this room's files, those in its folders included."""
    found: dict[str, type[Method]] = {}
    package = importlib.import_module("owpo_megatron.methods")
    for file in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(file.name)
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__:
                if "name" in vars(value) and value.name:
                    check_declaration(value)
                    assert value.name not in found, f"two methods are called {value.name}"
                    found[value.name] = value
    return found


def _entry_points() -> dict[str, EntryPoint]:
    """Find a method by its name.

    Raises:
        UserError: two packages have methods of one name.
    """
    found: dict[str, EntryPoint] = {}
    for entry_point in entry_points(group=GROUP):
        known = found.setdefault(entry_point.name, entry_point)
        if known.value != entry_point.value:
            remedy = f"both {known.value} and {entry_point.value} have this name; uninstall one of the packages"
            raise UserError("method", entry_point.name, remedy)
    return found


def _load(entry_point: EntryPoint) -> type[Method]:
    field = f"entry point {entry_point.name} of {GROUP}"
    try:
        method = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise UserError(field, entry_point.value, f"cannot be imported: {error}") from error
    check_declaration(method)
    if method.name != entry_point.name:
        raise UserError(field, entry_point.value, f"its class is named {method.name}; the two names must be equal")
    return method


def _from_python(name: str, field: str) -> type[Method]:
    module, _, attribute = name.removeprefix("python:").partition(":")
    if not module or not attribute:
        raise UserError(field, name, "write it as python:MODULE:CLASS")
    try:
        method = find_object(module, attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(field, name, f"cannot be imported: {error}") from error
    check_declaration(method)
    return method


def _identity(method: type) -> str:
    return f"{method.__module__}.{method.__qualname__}"
