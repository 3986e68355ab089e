"""The command line and the configuration start in a blink: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

HEAVY = ("torch", "megatron", "transformers", "matplotlib", "numpy", "pyarrow", "sympy")


@pytest.mark.parametrize(
    "module",
    ["owpo_megatron.config", "owpo_megatron.types", "owpo_megatron.errors", "owpo_megatron.cli.main",
     "owpo_megatron.run.metrics_reader", "owpo_megatron.report.table"],
)  # fmt: skip
def test_import_leaves_heavy_packages_out(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_launchers_checks_leave_torch_out() -> None:
    """Between `owpo train` and its ranks stands no import of torch: the launcher stays small beside them."""
    code = (
        "import sys, owpo_megatron.launch.preflight, owpo_megatron.launch.local;"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
