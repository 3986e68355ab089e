"""owpo setup-engine"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from owpo_megatron.cli.options import out
from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.command import find_device
from owpo_megatron.engine.install import engine_home, install_engine


def setup_engine(
    home: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Folder of the environment, if not the usual one.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Python 3.10 to 3.12 to make it with, if not this one.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(
            help="cuda: SGLang for NVIDIA GPUs. Its versions are resolved, but have not been installed or run."
        ),
    ] = "auto",
) -> None:
    """Make or update SGLang's environment, which `owpo train` and `owpo quickstart` start engines in.

    SGLang pins packages of its own, so it does not share the trainer's environment. A clone's `make setup` makes
    both; after `pip install`, this makes the second. Takes a few minutes and 1.6 GB on a CPU.

    Example: owpo setup-engine
    """
    target = home or engine_home()
    code = install_engine(target, python or Path(sys.executable), find_device(EngineConfig(device=device)))
    if code:
        raise typer.Exit(code)
    if home is not None and home.absolute() != engine_home():
        out.print(f"Set engine.python={escape(str(target / 'bin' / 'python'))} in the configuration.")
