"""Facts about torch and its libraries, asked in a process of its own: an import may crash or hang."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

ASK = "owpo_megatron.doctor.ask_torch"
SECONDS = 120


@functools.cache
def torch_facts() -> dict[str, Any]:
    """The JSON object of ask_torch.py; {"error": why} when torch cannot be imported."""
    try:
        asked = subprocess.run([sys.executable, "-m", ASK], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"import torch did not end within {SECONDS} s"}
    lines = asked.stdout.strip().splitlines()
    if asked.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    errors = asked.stderr.strip().splitlines()
    return {"error": errors[-1] if errors else f"import torch ended with exit code {asked.returncode}"}
