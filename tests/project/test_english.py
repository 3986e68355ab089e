"""The English of docstrings, comments, messages and documents: the rules of tools/check_english.py, and who keeps them.

Not covered: whether a sentence reads well. The rules find wordings that a pattern can match.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("check_english", ROOT / "tools" / "check_english.py")
assert _spec is not None and _spec.loader is not None
check = importlib.util.module_from_spec(_spec)
sys.modules["check_english"] = check
_spec.loader.exec_module(check)


def rules_broken(path: Path, text: str) -> list[tuple[int, str]]:
    path.write_text(text)
    return [(line, rule.name) for text in check.texts_of(path) for line, rule, _ in check.breaches(text)]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('x = 1\n"""Of the made answers."""\n', [(2, "of")]),
        ("# Seeds. Of each action,\n# the median.\n", [(1, "of")]),
        ('def f():\n    """Make it.\n\n    Args:\n        seed: of the samples.\n    """\n', [(5, "of")]),
        ('raise ValueError(f"{x}: the engine says so")\n', [(1, "say")]),
        ("# what the ranks were told\n", [(1, "tell")]),
        ("# The layout stands in\n# setup.py\n", [(1, "stand")]),
        ("# an engine that speaks HTTP\n", [(1, "speak")]),
        ("# the bucket goes by value\n", [(1, "goes by")]),
        ('help("threads; default: one a core")\n', [(1, "per")]),
        ('"""What a bucket holds."""\n', [(1, "opening")]),
    ],
)
def test_breaches_are_found_with_their_line(tmp_path: Path, code: str, found: list[tuple[int, str]]) -> None:
    assert rules_broken(tmp_path / "code.py", code) == found


@pytest.mark.parametrize(
    "code",
    [
        '"""Seed of the generated answers."""\n',
        "# The bar stands for the median, as the paper says.\n",
        "# 4 bytes per token; the rows a rank holds\n",
        "tells = told = 1\n",
        'y = x["told"]\n',
        "# At most, say, ten.\n",
    ],
)
def test_what_is_fine_is_left_alone(tmp_path: Path, code: str) -> None:
    assert rules_broken(tmp_path / "code.py", code) == []


def test_documents_are_read_without_their_code_blocks(tmp_path: Path) -> None:
    text = "# Head\n\nThe report\ntells.\n\n```\nit tells\n```\n\n- `it tells`\n- 3 files a run\n"
    assert rules_broken(tmp_path / "page.md", text) == [(3, "tell"), (11, "per")]


@pytest.mark.slow
@pytest.mark.process
def test_covered_files_keep_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert all((ROOT / name).exists() for name in check.COVERED)
    status = check.main([])
    assert status == 0, capsys.readouterr().out
