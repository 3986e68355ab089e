"""owpo protocol: the paper's two protocols."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from owpo_megatron.cli.compare import NoRun, end, make, show, with_local_run
from owpo_megatron.cli.options import Overrides, out, wide

ProtocolFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the protocol.")]

protocol = typer.Typer(no_args_is_help=True, help="The paper's two protocols: two-stage, and iterative self-evolution.")


@protocol.callback()
def _frame() -> None:
    """The paper's two protocols, each one command over all seeds and methods; resumable, with tables and figures."""


@protocol.command("two-stage")
def two_stage(config: ProtocolFile, overrides: Overrides = None, no_run: NoRun = False) -> None:
    """Train DAPO, take its best validation checkpoint as fixed reference, train every reference-guided method.

    The same command resumes after a stop. Ends with best and converged scores, as in the paper's Table 2.

    Example: owpo protocol two-stage -c examples/cpu-lab/two_stage.yaml
    """
    from owpo_megatron.experiments.lab import load_section
    from owpo_megatron.experiments.protocols import TwoStage
    from owpo_megatron.report.protocols import two_stage_table

    lab = with_local_run(load_section(TwoStage, config, overrides or ()), weights=not no_run).lab()
    table, failures = make(lab, no_run)
    show(lab.folder, table)
    wide().print(two_stage_table(table))
    end(failures)


@protocol.command("self-evolve")
def self_evolve(config: ProtocolFile, overrides: Overrides = None, no_run: NoRun = False) -> None:
    """Start from a suboptimal reference; after every stage the stage's best policy becomes the reference.

    The same command resumes after a stop. Ends with the score of every iteration, as in the paper's Figure 5.

    Example: owpo protocol self-evolve -c examples/cpu-lab/self_evolve.yaml
    """
    from owpo_megatron.experiments.lab import load_section
    from owpo_megatron.experiments.protocols import SelfEvolution, best_of_stages
    from owpo_megatron.report.protocols import draw_self_evolution, self_evolution_table

    settings = with_local_run(load_section(SelfEvolution, config, overrides or ()), weights=not no_run)
    lab = settings.lab()
    table, failures = make(lab, no_run)
    show(lab.folder, table)
    curves = json.loads((lab.folder / "curves.json").read_text())
    if curves["self-evolution"]:
        wide().print(self_evolution_table(table, curves, partial(best_of_stages, stage_steps=settings.stage_steps)))
        swaps = [settings.stage_steps * stage for stage in range(1, settings.iterations)]
        out.print(f"figure: {draw_self_evolution(table, curves, swaps, lab.folder / 'self_evolution.png')}")
    end(failures)
