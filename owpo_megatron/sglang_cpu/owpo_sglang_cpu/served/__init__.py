"""Register the served model's class alone: SGLang's registry imports all of its 220 model files, a CPU second.

SGLang reads models of a package that `SGLANG_EXTERNAL_MODEL_PACKAGE` names first, and its own ones only where that
package lacks the architecture. This package is one, with the class that SGLang itself has for it (served/model.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

PACKAGE_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"
MODULE_VARIABLE = "OWPO_SERVED_MODULE"
CLASS_VARIABLE = "OWPO_SERVED_CLASS"
MODELS = "sglang.srt.models"


def choose(model_path: str) -> None:
    """Have the processes that start from here register this model's class; without effect where none is found.

    A package that the user names stays.
    """
    file = Path(model_path) / "config.json"
    if os.environ.get(PACKAGE_VARIABLE) or not file.is_file():
        return
    spec = importlib.util.find_spec(MODELS)
    names = json.loads(file.read_text()).get("architectures") or []
    module = module_of(names[0], (spec and spec.submodule_search_locations) or ()) if len(names) == 1 else None
    if module is not None:
        os.environ |= {PACKAGE_VARIABLE: __name__, MODULE_VARIABLE: f"{MODELS}.{module}", CLASS_VARIABLE: names[0]}


def module_of(architecture: str, folders: Iterable[str]) -> str | None:
    """The module whose EntryClass is, or has, this class. The files are read, not imported."""
    named = re.compile(rf"^EntryClass\b[^=]*=[^=]*\b{re.escape(architecture)}\b", re.MULTILINE)
    found = [file.stem for folder in folders for file in Path(folder).glob("*.py") if named.search(file.read_text())]
    return found[0] if len(found) == 1 else None
