"""Every `>>>` example of the package runs. Not covered: the CPU plug-in, which only SGLang's environment imports."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "owpo_megatron"


def modules_with_examples() -> list[str]:
    """Dotted names of the modules whose source has a `>>>`."""
    files = (file for file in sorted(PACKAGE.rglob("*.py")) if "sglang_cpu" not in file.parts)
    found = (file.relative_to(ROOT).with_suffix("") for file in files if ">>> " in file.read_text())
    return [".".join(path.parts).removesuffix(".__init__") for path in found]


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_of(module: str) -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for test in finder.find(importlib.import_module(module)) if test.examples]
    assert tests, "the `>>>` is in no docstring that doctest finds"
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)


def test_there_are_examples() -> None:
    assert len(modules_with_examples()) > 15


def test_a_wrong_example_fails() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    runner = doctest.DocTestRunner()
    runner.run(test, out=lambda text: None)
    assert runner.failures == 1
