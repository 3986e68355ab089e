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
    """No import of torch between `owpo train` and its ranks: the launcher stays small next to them."""
    code = (
        "import sys, owpo_megatron.launch.preflight, owpo_megatron.launch.local;"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_front_door_is_light_and_complete() -> None:
    """Every name is there by import, by dir() and with its documentation; torch and pandas come on first use."""
    code = (
        "import sys, owpo_megatron;"
        "from owpo_megatron import Config, Method, register, train, evaluate, load_run;"
        "heavy = [name for name in ('torch', 'pandas', 'numpy', 'transformers', 'megatron') if name in sys.modules];"
        "names = [getattr(owpo_megatron, name) for name in owpo_megatron.__all__];"
        "assert all(one.__doc__ for one in names), names;"
        "assert set(owpo_megatron.__all__) <= set(dir(owpo_megatron));"
        "import torch;"
        "from owpo_megatron import num_active;"
        "print(heavy, num_active(0, 4, 8))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[] 8", done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import owpo_megatron

    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = owpo_megatron.trian
