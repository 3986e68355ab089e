"""The machine that tools/gpu_check.sh is for, as far as Python sees it: no other package can be found.

There are torch, Triton and transformers with what these require, and the wheels that docs/gpu_check.md lists, which are
installed without what they require. On the PYTHONPATH, so that the interpreters which a stage starts have it too.
"""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path
from typing import Any

MACHINE = ("torch", "triton", "transformers", "safetensors", "numpy", "setuptools", "pip")
PAGE = Path(__file__).parents[3] / "docs" / "gpu_check.md"
OURS = "owpo_megatron"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def listed() -> set[str]:
    """Packages in the first column of the page's last table."""
    rows = re.findall(r"^\| ([^|]+) \|", PAGE.read_text().partition("\n## Wheels\n")[2], re.MULTILINE)
    return {plain(word) for row in rows for word in re.findall(r"[A-Za-z][\w-]+", row)}


def there(found: dict[str, Distribution]) -> set[str]:
    """Names of the distributions that the machine has."""
    kept, waiting = {OURS, *(listed() & found.keys())}, [*MACHINE]
    while waiting:
        name = waiting.pop()
        if name in found and name not in kept:
            kept.add(name)
            required = [one for one in found[name].requires or () if "extra ==" not in one]
            waiting += [plain(match[0]) for one in required if (match := re.match(r"[\w.-]+", one))]
    return kept


class BareFinder(PathFinder):
    """PathFinder without what is not there; it leaves no trace in the metadata either."""

    modules: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in cls.modules else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *given: Any, **named: Any) -> Any:
        found = super().find_distributions(*given, **named)
        return [one for one in found if not cls.kept or plain(one.metadata["Name"]) in cls.kept]


def install() -> None:
    homes = packages_distributions()
    kept = there({plain(one.metadata["Name"]): one for one in Distribution.discover()})
    BareFinder.modules = frozenset(
        module for module, names in homes.items() if not kept & {plain(name) for name in names}
    )
    BareFinder.kept = frozenset(kept)
    sys.meta_path[sys.meta_path.index(PathFinder)] = BareFinder


install()
