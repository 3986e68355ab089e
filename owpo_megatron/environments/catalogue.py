"""Environments by name, and what makes an instance of one in its process."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from owpo_megatron.carried import PREFIX, find_object, is_carried
from owpo_megatron.environments.protocol import Environment
from owpo_megatron.errors import UserError

CLASSES = {
    "agent": ("owpo_megatron.environments.agent", "AgentEnvironment"),
    "calculator": ("owpo_megatron.environments.calculator", "Calculator"),
    "lookup": ("owpo_megatron.environments.lookup", "Lookup"),
    "python": ("owpo_megatron.environments.python_tool", "PythonTool"),
    "search": ("owpo_megatron.environments.search", "Search"),
    "verifiers": ("owpo_megatron.environments.verifiers", "VerifiersEnvironment"),
}
HTTP = ("owpo_megatron.environments.http", "HttpEnvironment")


@dataclass(frozen=True)
class EnvironmentMaker:
    """Makes instances of the environment `name`: one that ships, `python:MODULE:CLASS`, or a URL.

    It travels to the processes by name, or with the class by value where it exists in a notebook only.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    carried: bytes | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        pickled = self.carried
        if pickled is None and is_carried(self.name):
            import cloudpickle

            pickled = cloudpickle.dumps(self._class())
        return EnvironmentMaker, (self.name, dict(self.args), pickled)

    def check(self) -> EnvironmentMaker:
        """Make one, to see that it can be made.

        Raises:
            UserError: there is no such class, or it does not take these arguments.
        """
        made = self()
        for method in ("reset", "step"):
            if not callable(getattr(made, method, None)):
                remedy = f"it has no {method}(); an environment has reset(problem) and step(reply)"
                raise UserError("environment.name", self.name, remedy)
        return self

    @property
    def own_process(self) -> bool:
        """Whether instances live in processes of their own (protocol.py)."""
        return bool(getattr(self._class(), "own_process", False))

    def warm(self) -> None:
        """Import what instances need; making one imports what its arguments name."""
        if self.own_process:
            self()
        self._class()

    def __call__(self) -> Environment:
        try:
            made: Environment = self._class()(**self.args)
        except TypeError as error:
            raise UserError("environment.args", dict(self.args), f"{self.name} does not take them: {error}") from error
        return made

    def _class(self) -> Any:
        if self.carried is not None:
            import cloudpickle

            return cloudpickle.loads(self.carried)
        if self.name in CLASSES:
            return _attribute(*CLASSES[self.name])
        if self.name.startswith(("http://", "https://")):
            return partial(_attribute(*HTTP), self.name)
        module, _, attribute = self.name.removeprefix(PREFIX).partition(":")
        try:
            return find_object(module, attribute)
        except (ImportError, AttributeError) as error:
            raise UserError("environment.name", self.name, f"make it importable ({error})") from error


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)
