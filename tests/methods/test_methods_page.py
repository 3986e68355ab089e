"""docs/methods.md has the tables that tools/document_methods.py writes, and its code is that of a working method."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from owpo_megatron.methods import catalogue, check_coupling
from owpo_megatron.methods.catalogue import _registered

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text()


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    yield
    _registered.clear()


def test_the_tables_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("document_methods", ROOT / "tools" / "document_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page(PAGE) == PAGE, "run .venv/bin/python tools/document_methods.py"
    assert (ROOT / "docs" / "formulas.md").read_text() == module.formulas(), "run tools/document_methods.py"
    assert all(f"| `{name}` |" in PAGE for name in catalogue())


def test_the_methods_of_the_page_work() -> None:
    """Each Python block registers what it defines; the guard evaluates it."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    known: set[str] = set()
    for block in blocks:
        exec(compile(block, "docs/methods.md", "exec"), {"__name__": "__main__"})
        new = set(_registered) - known
        assert len(new) == 1
        check_coupling(_registered[new.pop()]())
        known = set(_registered)
