"""owpo protocol: the paper's two protocols."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from owpo_megatron.cli.compare import NoRun, end, make, show, with_local_run
from owpo_megatron.cli.options import Overrides, out, wide
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.experiments.lab import Lab

Beside = Annotated[
    Literal["paper"] | None, typer.Option("--beside", help="Show the paper's numbers beside these: paper.")
]
PaperModel = Annotated[
    str | None, typer.Option(metavar="NAME", help="The paper's model, if the folder's name is another.")
]
ProtocolFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the protocol.")]

protocol = typer.Typer(no_args_is_help=True, help="The paper's two protocols: two-stage, and iterative self-evolution.")


@protocol.callback()
def _frame() -> None:
    """The paper's two protocols, each one command over all seeds and methods; resumable, with tables and figures."""


@protocol.command("two-stage")
def two_stage(
    config: ProtocolFile,
    overrides: Overrides = None,
    no_run: NoRun = False,
    beside: Beside = None,
    paper_model: PaperModel = None,
) -> None:
    """Train DAPO, take its best validation checkpoint as fixed reference, train every reference-guided method.

    The same command resumes after a stop. Ends with best and converged scores, as in the paper's Table 2.

    Example: owpo protocol two-stage -c examples/cpu-lab/two_stage.yaml
    """
    from owpo_megatron.experiments.lab import load_section
    from owpo_megatron.experiments.protocols import TwoStage
    from owpo_megatron.report.protocols import two_stage_table

    lab = with_local_run(load_section(TwoStage, config, overrides or ()), weights=not no_run).lab()
    paper = _paper(lab, paper_model) if beside else None
    table, failures = make(lab, no_run)
    show(lab.folder, table)
    wide().print(two_stage_table(table, paper))
    end(failures)


@protocol.command("self-evolve")
def self_evolve(
    config: ProtocolFile,
    overrides: Overrides = None,
    no_run: NoRun = False,
    beside: Beside = None,
    paper_model: PaperModel = None,
) -> None:
    """Start from a suboptimal reference; after every stage the stage's best policy becomes the reference.

    The same command resumes after a stop. Ends with the score of every iteration, as in the paper's Figure 5.

    Example: owpo protocol self-evolve -c examples/cpu-lab/self_evolve.yaml
    """
    from owpo_megatron.experiments.lab import load_section
    from owpo_megatron.experiments.protocols import SelfEvolution, best_of_stages
    from owpo_megatron.report.protocols import draw_self_evolution, self_evolution_table

    settings = with_local_run(load_section(SelfEvolution, config, overrides or ()), weights=not no_run)
    lab = settings.lab()
    if beside:
        _paper(lab, paper_model)
    table, failures = make(lab, no_run)
    show(lab.folder, table)
    curves = json.loads((lab.folder / "curves.json").read_text())
    if curves["self-evolution"]:
        stages = partial(best_of_stages, stage_steps=settings.stage_steps)
        wide().print(self_evolution_table(table, curves, stages, paper=beside is not None))
        swaps = [settings.stage_steps * stage for stage in range(1, settings.most_iterations)]
        out.print(f"figure: {draw_self_evolution(table, curves, swaps, lab.folder / 'self_evolution.png')}")
    end(failures)


def _paper(lab: Lab, chosen: str | None) -> tuple[str, str]:
    """(model, evaluation set) of the paper that this protocol's scores are to be compared with.

    Raises:
        UserError: the model is none of the paper's, or the protocol's set is none.
    """
    from owpo_megatron.evaluation.sets import sets_of_run
    from owpo_megatron.report.published import paper_model, published

    run = lab.base_run()
    name, known = sets_of_run(run.eval, run.verifier.rule)[0].name, {one.set for one in published()}
    if name not in known:
        raise UserError("--beside", "paper", f"the paper has no scores on {name}; it has {', '.join(sorted(known))}")
    return paper_model(run.model.path.name, chosen), name
