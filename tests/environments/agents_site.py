"""The packages of .venv-agents, beside those of the environment that runs the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITES = sorted((ROOT / ".venv-agents" / "lib").glob("python*/site-packages"))
needs_agents = pytest.mark.skipif(not SITES, reason="no .venv-agents; run `make agents`")


def add_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the others on the path, which the processes of environments get, too."""
    monkeypatch.setattr(sys, "path", [*sys.path, *map(str, SITES)])
    monkeypatch.setenv("PATH", f"{ROOT / '.venv-agents' / 'bin'}:/usr/bin:/bin")
