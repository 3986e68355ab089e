"""Name the class of the served model as EntryClass, which SGLang's registry takes from each file of a package."""

from __future__ import annotations

import importlib
import os

from owpo_sglang_cpu.served import CLASS_VARIABLE, MODULE_VARIABLE

EntryClass = getattr(importlib.import_module(os.environ[MODULE_VARIABLE]), os.environ[CLASS_VARIABLE])
