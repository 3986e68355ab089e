"""The kinds of fault that the suite draws from, one function each, registered by a decorator.

    @fault("a rank is killed", promise="processes", by=("command", "ranks"))
    def a_rank_is_killed(trial: Trial) -> None:
        run = trial.start(tp=2)
        ...                                     # raises Wrong, Hang, Lost or TracebackShown

A module of kinds is a file `kinds_*.py` in this folder; `kinds()` finds it. `by` is how the fault can be injected:

    command   the `owpo` command, as a user starts it
    ranks     ranks that are forked with everything imported and enter where the command starts them
    part      one part of a run, with its real processes, sockets and files, but without training
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trial import Trial

By = Literal["command", "ranks", "part"]


@dataclass(frozen=True)
class Kind:
    """One kind of fault, and what it is injected into."""

    name: str
    promise: str  # the row of docs/reliability.md that it tests
    by: tuple[By, ...]
    inject: Callable[[Trial], None]
    quick: bool = False  # takes part in the short suite of `make test`


_KINDS: dict[str, Kind] = {}


def fault(
    name: str, promise: str, by: Sequence[By] = ("ranks",), quick: bool = False
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a kind; its function does everything in a trial and raises where a promise is broken."""

    def register(inject: Callable[[Trial], None]) -> Callable[[Trial], None]:
        assert name not in _KINDS or _KINDS[name].inject.__module__ == inject.__module__, f"{name} is there twice"
        _KINDS[name] = Kind(name, promise, tuple(by), inject, quick)
        return inject

    return register


def kinds() -> list[Kind]:
    """Every kind, in the order of its name."""
    for file in sorted(Path(__file__).parent.glob("kinds_*.py")):
        importlib.import_module(file.stem)
    return [_KINDS[name] for name in sorted(_KINDS)]
