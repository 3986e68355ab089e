"""owpo methods: the nine methods, what they are set to, and how hard each pushes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, out, wide

BETA = 2.0  # of the drawn penalty: the paper's 1e-3 would be a line at 1 in this window


def methods(
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the paper's Figure 3 from the methods' gradients.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List the methods: settings, reference, groups, divisor of the loss. docs/methods.md says what each is.

    Example: owpo methods --figure dynamics.png
    """
    from owpo_megatron.methods import OBJECTIVES, SAMPLE_MEAN

    rows = [
        {
            "name": name,
            "reference": objective.needs_reference,
            "groups": "unequal verdicts" if objective.dynamic_sampling else "all",
            "divisor": "samples" if name in SAMPLE_MEAN else "tokens",
            "settings": dataclasses.asdict(objective),  # type: ignore[call-overload]
        }
        for name, objective in OBJECTIVES.items()
    ]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("algorithm.name", "reference", "groups", "divided by", "settings"):
        table.add_column(title)
    for row in rows:
        settings = ", ".join(f"{field} {value:g}" for field, value in row["settings"].items())
        table.add_row(row["name"], row["reference"], row["groups"], row["divisor"], escape(settings))
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


def dynamics(points: int = 241, window: float = 0.8) -> dict[str, Any]:
    """delta, and g(delta) by label, for the methods that pull to the reference and for the one-way family."""
    import torch

    from owpo_megatron.methods import effective_progress, make_objective

    delta_D = torch.linspace(-window, window, points, dtype=torch.float64)
    penalised = make_objective("sym_dapo", beta=BETA)
    pulling = {
        f"Sym-DAPO, k3 with β = {BETA:g}, A = 1": effective_progress(penalised, delta_D, 1.0),
        f"Sym-DAPO, k3 with β = {BETA:g}, A = -1": effective_progress(penalised, delta_D, -1.0),
        "paper's local form 1 - β δ / |A|": 1 - BETA * delta_D,
        "OPD, A = 1": effective_progress(make_objective("opd"), delta_D, 1.0),
    }
    family = {
        "OWPO": "owpo",
        "w/o Asym": "owpo_no_asym",
        "w/o Locking": "owpo_no_locking",
        "w/o Accel": "owpo_no_accel",
        "DAPO": "dapo",
    }
    one_way = {label: effective_progress(make_objective(name), delta_D, 1.0) for label, name in family.items()}
    return {
        "delta": delta_D.tolist(),
        "pulling": {label: curve.tolist() for label, curve in pulling.items()},
        "one_way": {label: curve.tolist() for label, curve in one_way.items()},
    }
