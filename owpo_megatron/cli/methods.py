"""owpo methods: the methods, their settings, and how hard each pushes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, out, wide
from owpo_megatron.methods.hyper import hyper_parameters
from owpo_megatron.methods.method import Method

BETA = 2.0  # of the drawn penalty: the paper's 1e-3 would be a line at 1 in this window


def methods(
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the paper's Figure 3 from the methods' gradients.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List the methods: settings, reference, groups, divisor of the loss. docs/methods.md explains each.

    Example: owpo methods --figure dynamics.png
    """
    from owpo_megatron.methods.catalogue import catalogue

    rows = [_row(method) for method in catalogue().values()]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("algorithm.name", "reference", "groups", "divided by", "coupling", "settings"):
        table.add_column(title)
    for row in rows:
        settings = ", ".join(f"{field} {value}" for field, value in row["settings"].items())
        columns = [row[name] for name in ("name", "reference", "groups", "divisor", "coupling")]
        table.add_row(*columns, escape(settings))
    wide().print(table)
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
        "coupling": method.coupling,
        "divisor": method.divisor,
        "groups": "unequal verdicts" if method.groups == "mixed" else "all",
        "reference": method.reference,
        "refresh": method.refresh,
        "needs": {"old": method.needs_old, "reference": method.reference, "entropy": method.needs_entropy},
        "settings": {name: one.default for name, one in known.items()},
        "hyper": [
            {"name": n, "default": one.default, "bounds": one.bounds, "help": one.help} for n, one in known.items()
        ],
    }


def dynamics(points: int = 241, window: float = 0.8) -> dict[str, Any]:
    """delta, and g(delta) by label, for the methods that pull to the reference and for the one-way family."""
    import torch

    from owpo_megatron.methods import effective_progress, make_method

    delta_D = torch.linspace(-window, window, points, dtype=torch.float64)
    penalised = make_method("sym_dapo", beta=BETA)
    pulling = {
        f"Sym-DAPO, k3 with β = {BETA:g}, A = 1": effective_progress(penalised, delta_D, 1.0),
        f"Sym-DAPO, k3 with β = {BETA:g}, A = -1": effective_progress(penalised, delta_D, -1.0),
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
