"""The layers of the package, held by walking every import with ast. docs/rooms.md explains them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "owpo_megatron"

BASE = {"types", "config", "errors", "carried", "launched", "hub"}
PURE = {"methods", "head", "verifiers", "data", "run"}
ABOVE_PURE = {
    "families",
    "mcore",
    "conversion",
    "policy",
    "engine",
    "sync",
    "evaluation",
    "sinks",
    "samples",
    "environments",
    "workers",
}
ABOVE = {"trainer", "launch", "doctor", "plan", "report", "experiments", "reproduce", "bench", "api", "cli"}
EVERY_ROOM = BASE | PURE | ABOVE_PURE | ABOVE

# Room -> the rooms that it may import. A room that is not listed here fails the test: give it a place first.
MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "carried": set(),
    "launched": set(),
    "config": {"errors", "methods", "verifiers"},  # the catalogue of methods and the names of rules: no torch
    "hub": {"errors", "config"},
    "methods": {"types", "errors", "carried"},
    "head": BASE | {"methods"},
    "verifiers": BASE,
    "run": BASE,
    "data": BASE | {"verifiers"},  # a generated task writes its answers as its rule reads them
    "families": BASE,
    "mcore": BASE | {"methods", "head", "families", "run"},
    "engine": BASE | {"run"},
    "workers": BASE | {"engine", "verifiers", "data"},
    "environments": BASE | {"verifiers", "data"},
    "conversion": BASE | {"families", "mcore", "run"},
    "policy": BASE | PURE | {"families", "mcore"},
    "sync": BASE | {"engine", "run"},
    "evaluation": BASE | {"verifiers", "data", "engine", "environments", "run"},
    "sinks": BASE,
    "samples": BASE | {"run", "engine", "methods"},
    "trainer": BASE | {"methods", "run"},
    "launch": BASE | PURE | ABOVE_PURE,
    "plan": BASE | {"methods", "head", "families", "mcore", "engine", "launch", "run"},
    "doctor": BASE | PURE | ABOVE_PURE | {"launch", "plan"},
    "report": BASE | {"run", "samples"},
    "experiments": BASE | {"methods", "run", "engine", "launch", "report", "evaluation"},
    "reproduce": BASE | PURE | {"evaluation", "families", "engine", "launch", "plan", "report", "experiments", "api"},
    "api": BASE | PURE | {"engine", "conversion", "evaluation", "launch"},
    "bench": EVERY_ROOM - {"cli"},
    "cli": EVERY_ROOM,
    "sglang_cpu": set(),  # a distribution of its own, in the engine's environment
}

# Modules with rules of their own.
MAY_IMPORT_MODULE = {
    "trainer.build": EVERY_ROOM - {"api", "cli", "report", "launch", "experiments", "bench"},  # the composition root
    "trainer.build_plan": BASE | {"data", "methods", "verifiers"},
    "trainer.build_checks": BASE | {"engine", "run", "samples", "verifiers", "workers"},
    "trainer.build_data": BASE | {"data", "engine", "evaluation"},
    "trainer.build_drawing": BASE | {"environments", "evaluation", "run", "verifiers", "workers"},
    "trainer.build_engine": BASE | {"engine", "families", "policy", "run", "sync"},
    "trainer.build_metrics": BASE | {"families", "run", "sinks"},
    "trainer.build_reference": BASE | {"policy", "families", "engine"},
    "trainer.build_workers": BASE | {"engine", "mcore", "workers"},
    "trainer.evaluate": BASE | {"data", "evaluation"},
    "trainer.given": BASE | {"methods", "policy"},
    "trainer.loop": {"types", "methods"},  # Algorithm 1, and nothing else
    "trainer.parts": BASE | {"run", "families", "methods"},
    "trainer.sync_check": BASE | {"engine"},
    "trainer.train": BASE | {"run", "conversion"},
    "plan.simulate": BASE | {"families", "methods", "trainer"},  # the supply of steps, under a virtual clock
    "api.train": BASE | {"run", "launch", "trainer"},
    "api.rank": {"trainer"},
    "experiments.worker": BASE | {"run", "engine", "launch", "trainer"},  # it alone makes runs
}

# Outside package -> the rooms that may import it. What is not listed is free.
OUTSIDE = {
    "megatron": {"mcore"},
    "transformer_engine": {"mcore", "head"},
    "apex": {"mcore"},
    "httpx": {"engine", "sync", "launch", "doctor", "cli", "hub", "bench"},
    "aiohttp": {"engine", "bench"},
    "requests": set(),
    "sglang": {"sglang_cpu"},
    "ray": set(),
    "nemo_run": {"launch"},
    "matplotlib": {"report"},
    "typer": {"cli"},
}

# Rooms that are torch and nothing distributed: process groups are handed down, or not needed.
NO_PROCESS_GROUPS = {"types", "config", "errors", "methods", "verifiers", "run", "data", "report", "cli"}


def imports_of(source: str, module: str) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of every import, inside functions and type checks too."""
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def room_of(dotted: str) -> str | None:
    """`owpo_megatron.mcore.cpu.install` -> parallel; None outside the package and for the package itself."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "owpo_megatron" and len(parts) > 1 else None


def violations(source: str, module: str) -> list[str]:
    """Yield forbidden imports of this module, as `module:line imports name`."""
    room = room_of(module)
    assert room is not None
    if room not in MAY_IMPORT:
        return [f"{module}: the room {room} has no place in MAY_IMPORT"]
    allowed = MAY_IMPORT_MODULE.get(module.removeprefix("owpo_megatron."), MAY_IMPORT[room]) | {room}
    found = []
    for name, line in imports_of(source, module):
        target, top = room_of(name), name.split(".")[0]
        is_ours = target in EVERY_ROOM | {"sglang_cpu"}
        if (
            (is_ours and target not in allowed)
            or (top in OUTSIDE and room not in OUTSIDE[top])
            or (name.startswith("torch.distributed") and room in NO_PROCESS_GROUPS)
        ):
            found.append(f"{module}:{line} imports {name}")
    return found


def modules() -> list[tuple[str, Path]]:
    out = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if len(parts) > 1 and "build" not in parts:
            out.append((".".join(parts), file))
    return out


def test_every_import_keeps_to_the_layers() -> None:
    """Static imports only: importlib.import_module with a computed name is not seen."""
    found = [problem for module, file in modules() for problem in violations(file.read_text(), module)]
    assert found == []


def test_every_room_is_walked() -> None:
    rooms = {room_of(module) for module, _ in modules()}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))} <= rooms


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("owpo_megatron.methods.paper.owpo", "import megatron.core"),
        ("owpo_megatron.methods.paper.owpo", "import torch.distributed as dist"),
        ("owpo_megatron.trainer.loop", "from owpo_megatron.mcore import cpu"),
        ("owpo_megatron.engine.client", "from owpo_megatron.families.rules import x"),
        ("owpo_megatron.families.rules", "from ..engine import client"),
        ("owpo_megatron.policy.policy", "def f():\n    from megatron.core import parallel_state"),
        ("owpo_megatron.attic.old", "import json"),
    ],
)
def test_the_walk_sees_a_breach(module: str, line: str) -> None:
    assert len(violations(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("owpo_megatron.mcore.schedule", "from megatron.core import parallel_state"),
        ("owpo_megatron.trainer.build", "from owpo_megatron.mcore.topology import Topology"),
        ("owpo_megatron.config", "from owpo_megatron.errors import UserError"),
    ],
)
def test_the_walk_lets_the_rest_pass(module: str, line: str) -> None:
    assert violations(line, module) == []


def test_no_modules_import_each_other() -> None:
    """A cycle fails or not with the module that is imported first. Imports in functions and for types are free."""
    known = {module_of(file): file for file in PACKAGE.rglob("*.py")}
    graph = {name: {one for one in at_import(file.read_text(), name) if one in known} for name, file in known.items()}
    while free := [name for name, needs in graph.items() if not needs & graph.keys() - {name}]:
        for name in free:
            del graph[name]
    assert not graph, f"these import each other, or one that does: {', '.join(sorted(graph))}"


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def at_import(source: str, module: str) -> Iterator[str]:
    """Modules that are needed while this one is being imported: not those of `if TYPE_CHECKING`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names
            if not all((PACKAGE.parent / Path(*name.split("."))).with_suffix(".py").exists() for name in names):
                yield node.module
