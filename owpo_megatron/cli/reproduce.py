"""owpo reproduce: the paper's tables and figures, one command each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.compare import end, progress
from owpo_megatron.cli.options import Overrides, out, wide
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.api.evaluation_jobs import Job, Wish
    from owpo_megatron.reproduce.execute import Reproduction
    from owpo_megatron.reproduce.recipe import Recipe

Name = Annotated[str, typer.Argument(metavar="NAME", help="table2 to table6, figure3 to figure6, or reversals.")]


def reproduce(
    name: Name,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The base model; with --scale cpu the quickstart's if left out.")
    ] = None,
    scale: Annotated[Literal["paper", "cpu"], typer.Option(help="The paper's, or minutes on two CPU cores.")] = "paper",
    preset: Annotated[
        str, typer.Option(help="Readings of the text: paper (the literal ones) or recommended.")
    ] = "paper",
    seeds: Annotated[str, typer.Option(metavar="1,2,3", help="Seeds; cells are means over them.")] = "1",
    beside: Annotated[
        Literal["paper"] | None, typer.Option("--beside", help="Show the paper's numbers below the rows: paper.")
    ] = None,
    paper_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The paper's model, if the folder's name is another.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with the files of the evaluation sets, as of owpo eval.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Runs and results; default runs/paper/MODEL-SCALE.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Concurrent runs; default as of owpo compare.")] = None,
    launch: Annotated[
        bool, typer.Option("--launch", help="Submit the runs that can start now to Slurm instead of training here.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="GPU of the estimate: H100, H200 or A100.")] = "H100",
    gpu_memory: Annotated[float, typer.Option(min=1, metavar="GIB", help="Memory per GPU of the estimate.")] = 80.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List runs, steps, evaluations, memory and GPU hours; start nothing.")
    ] = False,
) -> None:
    """Make a table or figure of the paper: its runs, its evaluations on every set, its layout.

    The same command continues after a stop. Runs are shared: Tables 2, 3, 5 and 6 and Figure 4 have the same ones, and
    every reference is a checkpoint of their DAPO run. With --launch repeat the command until nothing is left to submit;
    without it the table is made from the finished runs.

    FIELD=VALUE changes every run, or, for a hyper-parameter of some methods (algorithm.penalty=k3), the runs of these.
    The stages of Figure 5 have reference.every steps; the score of the suboptimal reference is
    checkpoint.keep_at_score.

    Examples:

    owpo reproduce table2 --model models/Qwen2.5-Math-7B --dry-run

    owpo reproduce figure6 --scale cpu
    """
    from owpo_megatron.reproduce.artefacts import artefact
    from owpo_megatron.reproduce.execute import Reproduction

    wanted = artefact(name)
    place = folder or Path("runs/paper") / f"{model.resolve().name if model else 'cipher'}-{scale}"
    if wanted.kind == "dynamics":
        _figure_3(place, preset, overrides or [], dry_run)
        return
    if beside and wanted.kind == "reversals":
        raise UserError("--beside", "paper", "the paper has no such figure")
    recipe = _recipe(scale, model, preset, overrides or [], paper_model, place)
    if beside and recipe.model is None:
        raise UserError("--beside", "paper", "the sets of --scale cpu have no numbers in the paper")
    made = Reproduction(wanted, recipe, _seeds(seeds), place / "runs")
    if dry_run:
        _dry_run(made, gpu, gpu_memory)
        return
    if launch:
        _launch(made)
    else:
        if model is None:
            _make_base(recipe)
        out.print(f"{len(made.runs)} runs, {len(made.runs) - len(made.missing)} of them finished before")
        with progress(made.runs, made.root) as tell:
            failures = made.train(workers, tell)
        end(failures)
    if made.missing:
        waiting = ", ".join(run.label for run in made.missing)
        out.print(f"not finished: {escape(waiting)}; repeat the command once they are")
        return
    _show(_evaluated(made, data), place, recipe, beside is not None)


def _recipe(
    scale: str, model: Path | None, preset_name: str, overrides: Sequence[str], told: str | None, place: Path
) -> Recipe:
    from owpo_megatron.config import hf_folder
    from owpo_megatron.reproduce.recipe import cpu_recipe, paper_recipe, preset

    chosen = preset(preset_name)
    if scale == "cpu":
        if model is not None:
            hf_folder(model, "--model")
        return cpu_recipe(model, chosen, overrides, place / "sets")
    if model is None:
        raise UserError("--model", "(none)", "name the base model's folder; only --scale cpu has one of its own")
    recipe = paper_recipe(model, chosen, overrides, told)
    hf_folder(model, "--model")
    return recipe


def _make_base(recipe: Recipe) -> None:
    """The quickstart's base model, if it is not there yet."""
    from owpo_megatron.cli.quickstart import make_base_model
    from owpo_megatron.engine.command import check_interpreter

    path = recipe.run.model.path
    if not path.is_dir():
        if not recipe.run.engine.urls:
            check_interpreter(recipe.run.engine)  # before a base model is made in vain
        out.print(f"making the base model, once: {escape(str(path))}")
        make_base_model("cipher", path)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError("--seeds", text, "write integers separated by commas, e.g. 1,2,3") from None


def _wish(data: Path | None) -> Wish:
    from owpo_megatron.api.evaluation_jobs import Wish

    return Wish((), None, None, data, None, "auto", 0, False)


def _evaluated(made: Reproduction, data: Path | None) -> dict[str, Any]:
    """The result, with a line for each checkpoint that is evaluated now, and its progress."""
    from owpo_megatron.cli.evaluating import watching

    with watching() as progress_of:

        def watch(job: Job) -> Any:
            names = ", ".join(one.spec.title for one in job.sets)
            out.print(f"  evaluating {escape(job.target.label)} on {escape(names)}; an engine starts before the first")
            return progress_of

        return made.evaluate(_wish(data), watch, engines=made.recipe.run.engine.count > 1)


def _figure_3(place: Path, preset_name: str, overrides: Sequence[str], dry_run: bool) -> None:
    """No run: the effective progress of the methods themselves, Sym-DAPO's with the preset's penalty."""
    from owpo_megatron.cli.methods import dynamics
    from owpo_megatron.report.dynamics import draw_dynamics
    from owpo_megatron.reproduce.recipe import preset

    if overrides:
        raise UserError("figure3", overrides[0], "it has no runs to change; leave it out")
    penalty = preset(preset_name).methods.get("sym_dapo", {}).get("algorithm.penalty", "k3")
    if dry_run:
        out.print("no runs, no evaluations: figure3 draws the gradients of the methods, in seconds")
        return
    curves = dynamics(penalty=penalty)
    file = place / "figure3.png"
    draw_dynamics(curves["delta"], curves["pulling"], curves["one_way"], file)
    out.print(f"written: {escape(str(file))}")


def _dry_run(made: Reproduction, gpu: str, gpu_memory: float) -> None:
    from owpo_megatron.reproduce.estimate import estimate

    found = estimate(made, gpu, int(gpu_memory * 2**30))
    table = Table(box=None, header_style="bold", title=made.artefact.title, title_justify="left", title_style="bold")
    for column in ("run", "method", "reference"):
        table.add_column(column, no_wrap=True)
    for column in ("steps", "evaluations", "GiB per GPU", "GPU hours"):
        table.add_column(column, justify="right")
    for one in found.runs:
        label = f"{one.label} (finished)" if one.finished else one.label
        size = "-" if one.gib is None else f"{one.gib:.1f}" + ("" if one.fits else " does not fit")
        table.add_row(
            label,
            one.method,
            one.reference,
            str(one.steps),
            str(one.evaluations),
            size,
            "-" if one.hours is None else f"{one.hours:,.0f}",
        )
    console = wide()
    console.print(table)
    for line in found.lines:
        console.print(line)


def _launch(made: Reproduction) -> None:
    """Submit every missing run whose references are there and that has no job yet."""
    from owpo_megatron.launch.checks import check_job, check_model
    from owpo_megatron.launch.job import Job as ClusterJob
    from owpo_megatron.launch.slurm.record import submissions
    from owpo_megatron.launch.slurm.submit import submit_job

    for run in made.missing:
        if not all(needed.is_done(made.root) for needed in run.needs):
            out.print(f"waits for {escape(run.needs[0].label)}: {escape(run.label)}")
            continue
        config = run.placed(made.root)
        if any(submission.active() for submission in submissions(config.run_dir)):
            out.print(f"has a job: {escape(run.label)}")
            continue
        job = ClusterJob(config, Path.cwd())
        check_job(job)
        check_model(job)
        numbers = ", ".join(map(str, submit_job(job).jobs))
        out.print(f"submitted: job {numbers}, {escape(run.label)}")


def _show(result: dict[str, Any], place: Path, recipe: Recipe, beside: bool) -> None:
    from owpo_megatron.report.published import errata
    from owpo_megatron.report.reproduction import draw, figure_notes
    from owpo_megatron.report.scores import beside_paper
    from owpo_megatron.reproduce.execute import save, table_of

    files = [save(result, place)]
    table, notes = table_of(result), []
    if beside and recipe.model is not None:
        notes = figure_notes(result, recipe.model) + errata(result["name"])
        if result["kind"] in ("table", "curves"):  # the runs of its other figures are those of none of its tables
            table = beside_paper(table, {result["model"]: recipe.model})
    wide().print(table.rich())
    markdown = place / f"{result['name']}.md"
    markdown.write_text(table.markdown())
    files.append(markdown)
    if result["kind"] != "table":
        files.append(draw(result, place / f"{result['name']}.png"))
    for text in notes:
        out.print(f"[yellow]note:[/yellow] {escape(text)}")
    out.print(f"written: {', '.join(escape(str(file)) for file in files)}")
