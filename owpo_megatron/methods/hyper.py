"""Hyper-parameters of a method: a default, bounds and one line of help, declared where the method is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from owpo_megatron.errors import UserError


@dataclass(frozen=True)
class Hyper:
    """One declared hyper-parameter. Its type is that of its default: bool, int, float or str."""

    name: str
    default: bool | int | float | str
    help: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[str, ...] | None = None

    @property
    def bounds(self) -> str:
        """The allowed values in words, or "" where any will do.

        Example:
            >>> Hyper("share", 0.2, "Share of tokens that are kept.", gt=0, le=1).bounds
            'greater than 0 and at most 1'
        """
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = (("greater than", self.gt), ("at least", self.ge), ("less than", self.lt), ("at most", self.le))
        return " and ".join(f"{word} {bound:g}" for word, bound in words if bound is not None)

    def checked(self, value: Any, field: str) -> Any:
        """The value in the default's type.

        Raises:
            UserError: another type, not finite, or outside the bounds.
        """
        kind = type(self.default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and is_number:
            value = float(value)
        if type(value) is not kind:
            raise UserError(field, value, f"must be of type {kind.__name__}, e.g. {self.default}")
        if self.choices and value not in self.choices:
            raise UserError(field, value, f"must be {self.bounds}")
        if is_number and not self._inside(float(value)):
            raise UserError(field, value, f"must be {self.bounds or 'finite'}")
        return value

    def _inside(self, value: float) -> bool:
        return (
            abs(value) < float("inf")
            and (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )


def hyper(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field of a method, with the bounds that the configuration enforces.

    Example:
        clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    """
    declared = {"help": help, "gt": gt, "ge": ge, "lt": lt, "le": le, "choices": choices}
    return dataclasses.field(default=default, metadata={"hyper": declared})


def hyper_parameters(method: type) -> dict[str, Hyper]:
    """The declared hyper-parameters of a method class, by name, in the order of their declaration."""
    return {
        field.name: Hyper(field.name, _default(field), **field.metadata["hyper"])
        for field in dataclasses.fields(method)
        if "hyper" in field.metadata
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default
