"""owpo plan: memory of a run, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import ConfigFile, JsonFile, Overrides, load_config, out

if TYPE_CHECKING:
    from owpo_megatron.config import Config
    from owpo_megatron.plan import Plan


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu_memory: Annotated[float, typer.Option(min=1, metavar="GIB", help="Memory per GPU.")] = 80.0,
    gpu: Annotated[str, typer.Option(help="GPU of the estimates: H100, H200, H20 or A100.")] = "H100",
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for CPU ranks: local layers, the torch head.")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate steps on clusters of these sizes instead.")
    ] = False,
    nodes: Annotated[list[int] | None, typer.Option(min=1, help="With --simulate: nodes; may be given again.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="With --simulate: a run's folder, or lognormal:MEDIAN,SIGMA.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="With --simulate: against another system's published step times.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Estimate the memory of each GPU before anything starts: the trainer's needs, and what is left for the engine's
    cache. Reads only the model's config.json. Exit code 1: it does not fit.

    The formulae are in docs/plan.md.

    Example: owpo plan -c examples/qwen3-8b-base/config.yaml algorithm.name=dapo --gpu-memory 141

    Example: owpo plan -c examples/qwen3-8b-base/config.yaml --simulate --nodes 4 --json sizes.json
    """
    from owpo_megatron.config import hf_folder
    from owpo_megatron.families import supported_family

    loaded = load_config(config, overrides or (), weights=False)
    supported_family(hf_folder(loaded.model.path))
    if simulate:
        _simulate(loaded, nodes, gpu, gpu_memory, lengths, published, json_file)
        return
    from owpo_megatron.plan import make_plan  # seconds, with torch

    made = make_plan(loaded, int(gpu_memory * 2**30), cuda=not cpu)
    par = loaded.parallel
    out.print(
        f"[bold]{escape(loaded.name)}[/bold]: {loaded.algorithm.name}, {_count(made.parameters)} parameters in "
        f"{loaded.model.dtype}, {par.sizes}"
    )
    out.print(_table(made))
    if not cpu and made.engine is not None:
        out.print(_hours(loaded, int(gpu_memory * 2**30), gpu))
    if made.problem:
        out.print(f"[bold red]does not fit:[/bold red] {made.problem}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(made.as_dict(), indent=1) + "\n")
        out.print(f"written: {escape(str(json_file))}")
    if made.problem:
        raise typer.Exit(1)


def _simulate(
    config: Config,
    nodes: list[int] | None,
    gpu: str,
    gpu_memory: float,
    lengths: str | None,
    published: bool,
    json_file: Path | None,
) -> None:
    from owpo_megatron.cli.simulating import compare_with_published, simulate_clusters

    if published:
        found = compare_with_published(config)
    else:
        found = simulate_clusters(config, nodes or [1, 4, 16, 64], gpu, gpu_memory, lengths)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(found, indent=1) + "\n")
        out.print(f"written: {escape(str(json_file))}")


def _hours(config: Config, gpu_bytes: int, gpu: str) -> str:
    """GPU hours of the run, a rough estimate, in words."""
    from owpo_megatron.config import hf_folder
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.plan.hours import Assumptions, gpu_hours

    guess = Assumptions(gpu=gpu)
    found = gpu_hours(config, read_hf_config(hf_folder(config.model.path)), gpu_bytes, (), guess)
    return (
        f"about {found.total:,.0f} hours of {gpu} for {config.optimizer.steps} steps without evaluations: "
        f"{found.rollouts:,.0f} rollouts, {found.updates:,.0f} updates; a guess, not measured (docs/plan.md)"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _table(made: Plan) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("on each GPU of the trainer" + (f", stage {made.trainer.stage}" if len(made.stages) > 1 else ""))
    table.add_column("GiB", justify="right")
    trainer = made.trainer
    in_steps = trainer.optimizer - trainer.optimizer_at_rest
    rows = [
        ("weights", trainer.weights),
        ("gradients, float32", trainer.gradients),
        ("optimizer, this rank's share", trainer.optimizer_at_rest),
        ("reference and teachers", trainer.reference),
        ("activations, estimated", trainer.activations),
        ("head, chunks of logits", trainer.head),
        ("instead of these two: weights in transfer to engines", trainer.sync),
        *([("instead of these: the optimizer's memory during steps", in_steps)] if in_steps else []),
        ("overhead, a guess", made.trainer_total - trainer.total),
        ("trainer, at its peak", made.trainer_total),
    ]
    shared = made.engine_place == "trainer's nodes"
    if made.engine and shared:
        rows.append(("engine: weights and cache" + (", in turn" if made.in_turn else ""), made.engine.static))
    if made.contexts:
        rows.append(("rank 0's GPU alone: contexts of the other engines, a guess", made.contexts))
    rows += [("used", made.used), ("free", made.free)]
    for what, count in rows:
        table.add_row(what, f"{count / 2**30:.1f}")
    if trainer.host:
        table.add_row("host memory: offloaded slots, best of the stage", f"{trainer.host / 2**30:.1f}")
    if made.engine:
        table.add_section()
        table.add_row(f"on each GPU of an engine ({made.engine_place})", "")
        table.add_row("weights", f"{made.engine.weights / 2**30:.1f}")
        table.add_row("cache", f"{made.engine.cache / 2**30:.1f}")
        at_once = made.engine.tokens / made.full_length
        table.add_row(f"tokens in an engine's cache: {made.engine.tokens:,}", "")
        table.add_row(f"full-length responses at a time: {at_once:,.1f}", "")
    return table
