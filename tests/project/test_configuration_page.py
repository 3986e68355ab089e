"""docs/configuration.md is what tools/document_config.py writes, and no field is without a meaning."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def written() -> str:
    spec = importlib.util.spec_from_file_location("document_config", ROOT / "tools" / "document_config.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


def test_the_page_is_up_to_date() -> None:
    remedy = "run .venv/bin/python tools/document_config.py"
    assert (ROOT / "docs" / "configuration.md").read_text() == written(), remedy


def test_every_field_has_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", written(), re.MULTILINE)
    assert len(rows) > 100
    assert [name for name, meaning in rows if not meaning.strip()] == []
