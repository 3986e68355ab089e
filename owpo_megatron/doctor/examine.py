"""All checks by name, in order; a check that raises is itself a finding."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from owpo_megatron.doctor.finding import Finding, Scope
from owpo_megatron.errors import UserError


@dataclass(frozen=True)
class Check:
    """A check: `function` of `module` in this package takes a Scope and yields findings."""

    module: str
    function: str
    about: str
    starts_processes: bool = False  # ranks or an engine: seconds, and cores that a run on this machine would miss
    needs_config: bool = False


CHECKS: dict[str, Check] = {
    "packages": Check("packages", "packages", "installed versions, and whether they fit together"),
    "devices": Check("devices", "devices", "GPUs, driver, CUDA, NCCL, Transformer Engine, apex"),
    "memory": Check("memory", "memory", "free memory, against what the run needs"),
    "disk": Check("storage", "disk", "the run folder: writable, room, speed"),
    "sockets": Check("storage", "sockets", "room for the names of sockets in TMPDIR"),
    "hosts": Check("network", "hosts", "host names that must resolve"),
    "ports": Check("network", "ports", "the engine's address and port"),
    "config": Check("inputs", "settings", "what `owpo train` checks before it starts", needs_config=True),
    "model": Check("inputs", "model", "shape against the parallel layout, weights, tokenizer", needs_config=True),
    "data": Check("inputs", "data", "problems, read as the run will read them", needs_config=True),
    "engine": Check("engine", "environment", "SGLang's environment, or the servers that run already"),
    "ranks": Check("ranks", "ranks", "collectives of real ranks: sums, bandwidth, clocks", starts_processes=True),
    "start": Check("engine", "start", "an SGLang server that starts and draws tokens", starts_processes=True),
}


def examine(scope: Scope, only: Collection[str] = (), quick: bool = False) -> Iterator[Finding]:
    """Every finding, as it comes; the slow checks last.

    Args:
        only: names of CHECKS; empty: all.
        quick: leave out the checks that start processes of their own.

    Raises:
        UserError: `only` names an unknown check, or one of a run where there is no configuration.
    """
    for name in only:
        if name not in CHECKS:
            raise UserError("--only", name, f"use one of {', '.join(CHECKS)}")
        if CHECKS[name].needs_config and scope.config is None:
            raise UserError("--only", name, "checks a run; give its configuration with -c")
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        if (quick and check.starts_processes) or (scope.config is None and check.needs_config):
            continue
        yield from _run(name, check, scope)


def _run(name: str, check: Check, scope: Scope) -> Iterator[Finding]:
    try:
        module = importlib.import_module(f"owpo_megatron.doctor.{check.module}")
        function: Callable[[Scope], Iterator[Finding]] = getattr(module, check.function)
        yield from function(scope)
    except UserError as error:
        yield Finding(name, "fail", f"{error.field} = {error.value}", error.remedy)
    except ImportError as error:
        remedy = "run `make setup`, or install what is missing in this environment"
        yield Finding(name, "fail", f"this check cannot run: {error}", remedy)
    except Exception as error:  # a broken machine is a finding, not the doctor's end
        text = f"this check broke: {type(error).__name__}: {error}".strip().splitlines()[0]
        frame = traceback.extract_tb(error.__traceback__)[-1]
        remedy = f"fix what the text names; otherwise report a bug in the doctor, at {frame.filename}:{frame.lineno}"
        yield Finding(name, "fail", text, remedy)
