"""owpo doctor"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, Overrides, load_config, out
from owpo_megatron.errors import UserError

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
_BACKENDS = ("auto", "gloo", "nccl")


def doctor(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Also check what this run needs."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Check this many nodes, reached by srun.")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the test collectives: auto, gloo or nccl.")] = "auto",
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Run only this check, e.g. disk. Repeatable.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Skip checks that start ranks or an engine; takes seconds.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Check everything a run needs before it starts, with a remedy for each problem: under a minute, on a CPU.

    Packages, devices, memory, disk, host names, ports; with -c the settings, the model against the layout, tokenizer
    and data; real ranks that sum numbers, and an SGLang server that draws tokens. Nothing is changed.

    Exit code 1 if a check failed; warnings do not count.

    Example: owpo doctor -c run.yaml --nodes 4
    """
    from owpo_megatron.doctor import Finding, Scope, examine

    if backend not in _BACKENDS:
        raise UserError("--backend", backend, f"use one of {', '.join(_BACKENDS)}")
    settings = load_config(config, overrides or [], weights=False) if config else None
    spread = nodes or (settings.launch.nodes if settings else 1)
    scope = Scope(settings, spread, reach_nodes=nodes is not None, backend=backend)  # type: ignore[arg-type]
    began = time.monotonic()
    findings: list[Finding] = []
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    spinner = Spinner("dots", text="checking ...")
    with Live(Group(table, spinner), console=out, refresh_per_second=8) as live:
        for finding in examine(scope, only or (), quick):
            findings.append(finding)
            table.add_row(*_row(finding.status, finding.what, finding.detail, finding.remedy))
        live.update(table)
    seconds = time.monotonic() - began
    failed = [finding.what for finding in findings if finding.status == "fail"]
    out.print(f"\n{seconds:.0f} s. " + (f"[red]Fix first:[/red] {escape(', '.join(failed))}" if failed else "Ready."))
    if json_file is not None:
        json_file.write_text(json.dumps(_result(seconds, [asdict(finding) for finding in findings]), indent=2) + "\n")
    if failed:
        raise typer.Exit(1)


def _row(status: str, what: str, detail: str, remedy: str) -> tuple[str, str, str]:
    color = _COLORS[status]
    shown = escape(detail) + (f"\n[dim]->[/dim] {escape(remedy)}" if remedy else "")
    return f"[{color}]{status}[/{color}]", escape(what), shown


def _result(seconds: float, findings: list[dict[str, str]]) -> dict[str, object]:
    result: dict[str, object] = {"seconds": round(seconds, 1), "findings": findings}
    try:
        from owpo_megatron.launch.machine import machine

        return {"machine": machine(), **result}
    except ImportError:  # psutil is missing, which is a finding of its own
        return result
