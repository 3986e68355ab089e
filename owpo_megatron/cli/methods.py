"""owpo methods: the methods, their settings, and how hard each pushes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, out, wide
from owpo_megatron.errors import UserError
from owpo_megatron.methods.hyper import hyper_parameters
from owpo_megatron.methods.method import Method

BETA = 2.0  # of the drawn penalty: the paper's 1e-3 would be a line at 1 in this window


def methods(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Only methods whose name, summary or paper has them."),
    ] = None,
    kind: Annotated[str | None, typer.Option(help="objective, advantage or sampling.")] = None,
    coupling: Annotated[str | None, typer.Option(help="token, sample, group or minibatch.")] = None,
    needs: Annotated[str | None, typer.Option(help="E.g. reference, entropy, text, ledger.")] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the paper's Figure 3 from the methods' gradients.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List the methods: kind, needs, divisor of the loss, groups, settings, paper. docs/methods.md explains each.

    Example: owpo methods --kind advantage
    """
    from owpo_megatron.methods.catalogue import catalogue

    every = [_row(method) for method in catalogue().values()]
    for option, field, value in (("--kind", "kind", kind), ("--coupling", "coupling", coupling)):
        known = sorted({row[field] for row in every})
        if value is not None and value not in known:
            raise UserError(option, value, f"use one of {', '.join(known)}")
    known = sorted({need for row in every for need in _needs(row)})
    if needs is not None and needs not in known:
        raise UserError("--needs", needs, f"use one of {', '.join(known)}")
    rows = [
        row
        for row in every
        if (kind is None or row["kind"] == kind)
        and (coupling is None or row["coupling"] == coupling)
        and (needs is None or needs in _needs(row))
        and all(word.lower() in _text(row) for word in words or ())
    ]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("algorithm.name", "kind", "coupling", "needs", "divided by", "groups", "settings", "paper"):
        table.add_column(title, overflow="fold", no_wrap=title == "algorithm.name")
    for row in rows:
        settings = ", ".join(f"{field} {value}" for field, value in row["settings"].items())
        cells = (row["name"], row["kind"], row["coupling"], ", ".join(_needs(row)), row["divisor"], row["groups"])
        table.add_row(*cells, escape(settings), escape(row["paper"]))
    wide().print(table)
    out.print(f"{len(rows)} of {len(every)} methods")
    result: dict[str, Any] = {"methods": rows}
    if figure is not None:
        from owpo_megatron.report.dynamics import draw_dynamics

        curves = dynamics()
        draw_dynamics(curves["delta"], curves["pulling"], curves["one_way"], figure)
        result["dynamics"] = curves
        out.print(f"written: {escape(str(figure))}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=1) + "\n")
        out.print(f"written: {escape(str(json_file))}")


def _row(method: type[Method]) -> dict[str, Any]:
    """A method's declaration in plain values."""
    known = hyper_parameters(method)
    return {
        "name": method.name,
        "summary": method.summary,
        "paper": method.paper,
        "kind": method.kind,
        "coupling": method.coupling,
        "divisor": method.divisor,
        "groups": "unequal verdicts" if method.groups == "mixed" else "all",
        "reference": method.reference,
        "refresh": method.refresh,
        "needs": {
            "old": method.needs_old,
            "reference": method.reference,
            "entropy": method.needs_entropy,
            "old_entropy": method.needs_old_entropy,
            "statistic": method().statistic is not None,
            "text": method.needs_text,
            "tokens": method.needs_tokens,
            "ledger": method.keeps_ledger,
            "solutions": method.needs_solutions,
            "stored": method.stores_responses,
        },
        "settings": {name: one.default for name, one in known.items()},
        "hyper": [
            {"name": n, "default": one.default, "bounds": one.bounds, "help": one.help} for n, one in known.items()
        ],
    }


def _needs(row: Mapping[str, Any]) -> list[str]:
    """Names of what a method needs besides the current policy's log-probs."""
    return [name for name, value in row["needs"].items() if value and value != "none"]


def _text(row: Mapping[str, Any]) -> str:
    return f"{row['name']} {row['summary']} {row['paper']}".lower()


def dynamics(points: int = 241, window: float = 0.8, penalty: str = "k3") -> dict[str, Any]:
    """delta, and g(delta) by label, for the methods that pull to the reference and for the one-way family."""
    import torch

    from owpo_megatron.methods import effective_progress, make_method

    delta_D = torch.linspace(-window, window, points, dtype=torch.float64)
    penalised = make_method("sym_dapo", beta=BETA, penalty=penalty)
    pulling = {
        f"Sym-DAPO, {penalty} with β = {BETA:g}, A = 1": effective_progress(penalised, delta_D, 1.0),
        f"Sym-DAPO, {penalty} with β = {BETA:g}, A = -1": effective_progress(penalised, delta_D, -1.0),
        "paper's local form 1 - β δ / |A|": 1 - BETA * delta_D,
        "OPD, A = 1": effective_progress(make_method("opd"), delta_D, 1.0),
    }
    family = {
        "OWPO": "owpo",
        "w/o Asym": "owpo_no_asym",
        "w/o Locking": "owpo_no_locking",
        "w/o Accel": "owpo_no_accel",
        "DAPO": "dapo",
    }
    one_way = {label: effective_progress(make_method(name), delta_D, 1.0) for label, name in family.items()}
    return {
        "delta": delta_D.tolist(),
        "pulling": {label: curve.tolist() for label, curve in pulling.items()},
        "one_way": {label: curve.tolist() for label, curve in one_way.items()},
    }
