"""Options that several commands share, and how they speak."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

ConfigFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML configuration of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Fields to change, e.g. parallel.tp=2 optimizer.steps=10."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON, too.")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_IN_A_FILE = 132  # columns of a table that no terminal limits


def wide() -> Console:
    """The terminal, or a console of lines long enough for a table where there is none."""
    return out if out.is_terminal else Console(width=LINE_IN_A_FILE)


def this_command() -> str:
    """What a person types to run `owpo` again from here: plain `owpo` where the shell finds this one."""
    here = Path(sys.argv[0])
    found = shutil.which("owpo")
    if here.name != "owpo" or (found and Path(found).samefile(here)):
        return "owpo"
    return os.path.relpath(here)
