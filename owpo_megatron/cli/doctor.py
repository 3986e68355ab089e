"""owpo doctor"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, Overrides, out
from owpo_megatron.config import Config

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Look at what this run needs, too."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Look at packages, devices, memory, disk, ports and both environments; say what to do about what is wrong.

    Exit code 1 when a run could not work.
    """
    from owpo_megatron.launch.doctor import examine
    from owpo_megatron.launch.machine import machine

    settings = Config.load(config, overrides or []) if config else None
    with out.status("looking around ..."):
        findings = list(examine(settings))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    for finding in findings:
        color = _COLORS[finding.status]
        told = escape(finding.detail) + (f"\n[dim]->[/dim] {escape(finding.remedy)}" if finding.remedy else "")
        table.add_row(f"[{color}]{finding.status}[/{color}]", escape(finding.what), told)
    out.print(table)
    if json_file is not None:
        result = {"machine": machine(), "findings": [asdict(finding) for finding in findings]}
        json_file.write_text(json.dumps(result, indent=2) + "\n")
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)
