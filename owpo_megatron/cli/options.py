"""Options and consoles that several commands share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.hub import with_local_models

ConfigFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML configuration of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="FIELD=VALUE", help="Fields to change, e.g. parallel.tp=2 optimizer.steps=10."),
]


def writable(file: Path | None) -> Path | None:
    """A file that a command will write: found wanting before the work, not after it.

    Raises:
        UserError: it is a folder, or cannot be written there.
    """
    if file is None:
        return None
    if file.is_dir():
        raise UserError("FILE", file, "is a folder; name a file in it")
    folder = next((one for one in file.absolute().parents if one.exists()), file.absolute().parent)
    if not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError("FILE", file, f"cannot be written: {folder} is no folder that you may write to; name another")
    return file


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the result as JSON.", callback=writable),
]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_IN_A_FILE = 132  # columns without a terminal


def wide() -> Console:
    """The terminal, or, into a file or a pipe, a console with lines wide enough for tables."""
    return out if out.is_terminal else Console(width=LINE_IN_A_FILE)


def note(text: str) -> None:
    """A line for a person, apart from a command's output."""
    err.print(escape(text))


def load_config(file: Path, overrides: Sequence[str], weights: bool = True) -> Config:
    """`Config.load`, with the models that it names by hub downloaded (only their small files without `weights`).

    Raises:
        UserError: as Config.load, or a model is neither here nor on the hub.
    """
    return with_local_models(Config.load(file, overrides), note, weights)


def this_command() -> str:
    """The command that runs this `owpo` again from here: plain `owpo` if the shell finds it."""
    here = Path(sys.argv[0])
    found = shutil.which("owpo")
    if here.name != "owpo" or (found and Path(found).samefile(here)):
        return "owpo"
    return os.path.relpath(here)
