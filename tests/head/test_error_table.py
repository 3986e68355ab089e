"""Losses and gradients of every registered method with the FP8 head, on hidden states of models: within the bounds.

The bounds are those at which a run goes back to the exact head. `make test` has the model of
the quickstart, with few columns; `make matrix` a vocabulary of 151,936 with a nearly flat distribution.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from owpo_megatron.head import tail
from owpo_megatron.head.fp8_check import MAX_MEAN, MAX_P99
from owpo_megatron.methods import catalogue, make_method

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "golden" / "base_model"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_method_on_hidden_states_of_the_quickstarts_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tool("head_error_table")
    monkeypatch.setattr(sys, "argv", ["", "--model", str(MODEL), "--out", str(tmp_path / "errors.md")])
    assert table.main() == 0
    cases, methods = tool("document_head_errors").tables((tmp_path / "errors.md").read_text())
    assert len(cases) == 2 and sorted(methods) == sorted(catalogue())


@pytest.mark.slow
def test_a_head_that_is_wrong_is_beyond_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tail is raised by 0.3 instead of what FP8 did to it."""
    table = tool("head_error_table")
    monkeypatch.setattr(tail.TailError, "shift", lambda self, mean_C, inverse: mean_C.new_full(mean_C.shape, 0.3))
    monkeypatch.setattr(sys, "argv", ["", "owpo", "--model", str(MODEL)])
    assert table.main() == 1


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_every_method_on_a_large_flat_vocabulary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random weights of the shape of Qwen2.5-0.5B. All tokens have the same entropy there, to three digits after the
    point: which of them entropy_mask keeps is decided by less than FP8 gets wrong."""
    table = tool("head_error_table")
    monkeypatch.setattr(sys, "argv", ["", "--random-model", "--out", str(tmp_path / "errors.md")])
    table.main()
    cases, methods = tool("document_head_errors").tables((tmp_path / "errors.md").read_text())
    assert sorted(methods) == sorted(catalogue())
    assert all(float(mean) < MAX_MEAN and float(p99) < MAX_P99 for mean, p99, _ in cases.values()), cases
    beyond = {name for name, cells in methods.items() if any("**" in cell for cell in cells)}
    assert beyond <= {"entropy_mask"} | {name for name in methods if make_method(name).needs_exact_head}
