"""SGLang's own environment: its location, and how `owpo setup-engine` and `make setup` create it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import owpo_megatron

PACKAGE = Path(owpo_megatron.__file__).resolve().parent


def project_files() -> Path:
    """Return the root of the clone, or the folder of a wheel with those of its files that are needed at run time.

    Below it are `examples/quickstart/`, `requirements/`, `tools/make_env.sh` and the Makefile; setup.py copies them.
    """
    clone = PACKAGE.parent
    return clone if (clone / "tools" / "make_env.sh").is_file() else PACKAGE / "shipped"


def is_clone() -> bool:
    return project_files() == PACKAGE.parent


def engine_home() -> Path:
    """Return the folder of SGLang's environment: in the clone, or next to the environment this process runs in.

    A `/home/me/venv` gets a `/home/me/venv-engine`. An interpreter outside any environment gets a folder in the user's
    data directory.
    """
    if is_clone():
        return PACKAGE.parent / ".venv-engine"
    here = Path(sys.prefix)
    if sys.prefix != sys.base_prefix:
        return here.with_name(f"{here.name}-engine")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / "owpo" / f"engine-{owpo_megatron.__version__}"


def how_to_install() -> str:
    """Return the instruction that creates the environment which `find_python` looks for."""
    return "run `make setup`" if is_clone() else f"run `owpo setup-engine`, which makes {engine_home()}"


def install_engine(home: Path, python: Path, device: str) -> int:
    """Create or update the environment, with progress on the terminal. The log is `home/setup.log`.

    Args:
        device: "cpu" installs SGLang's CPU subset with the plug-in, "cuda" everything that SGLang requires.

    Returns:
        Exit code of tools/make_env.sh.
    """
    script = project_files() / "tools" / "make_env.sh"
    kind = "engine" if device == "cpu" else "engine-gpu"
    variables = {"ENGINE_DIR": str(home.absolute()), "PYTHON": str(python)}
    return subprocess.run(["bash", str(script), kind], env={**os.environ, **variables}).returncode
