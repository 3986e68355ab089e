"""owpo plan --simulate: seconds of a step on clusters of several sizes, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from owpo_megatron.cli.options import out

if TYPE_CHECKING:
    from owpo_megatron.config import Config
    from owpo_megatron.plan.published import Compared
    from owpo_megatron.plan.simulate import Simulated

LENGTHS = "lognormal:1200,1.0"
PHASES = ("rollout", "old_logp", "reference", "update", "sync")


def simulate_clusters(
    config: Config, nodes: Sequence[int], gpu: str, gpu_memory: float, lengths: str | None
) -> dict[str, Any]:
    """Simulate each size in turns and with generation beside training, print a table, and return it as plain keys."""
    from owpo_megatron.config import hf_folder
    from owpo_megatron.families import check_parallel, read_hf_config
    from owpo_megatron.methods import make_method
    from owpo_megatron.plan.hours import Assumptions
    from owpo_megatron.plan.lengths import lengths_of
    from owpo_megatron.plan.machine import Machine
    from owpo_megatron.plan.simulate import Cluster, simulate

    model = read_hf_config(hf_folder(config.model.path))
    check_parallel(model, config.parallel)
    per_node = config.launch.gpus_per_node or 8
    machine = Machine(gpu, int(gpu_memory * 2**30), per_node)
    spec = lengths or LENGTHS
    draw = lengths_of(spec, config.rollout.max_response_tokens)
    drawn = Assumptions().groups_drawn if config.rollout.keeps_mixed_groups(make_method(config.algorithm)) else 1.0
    streams = config.rollout.surplus > 0
    found = []
    for count in nodes:
        gpus = count * per_node
        half = gpus // 2
        found.append(simulate(config, model, machine, Cluster(gpus, gpus, True), draw, 0, drawn=drawn))
        bound = max(1, config.rollout.max_staleness)
        found.append(
            simulate(
                config, model, machine, Cluster(gpus - half, half, False), draw, bound, drawn=drawn, streams=streams
            )
        )
    out.print(_table(found))
    out.print(
        f"lengths {spec}; {gpu}: {machine.mfu:.0%} of the peak in passes, {machine.decoding:.0%} of the bandwidth "
        "while decoding: guesses, not measured (docs/scale.md)"
    )
    return {"lengths": spec, "gpu": gpu, "groups_drawn": drawn, "simulated": [one.as_dict() for one in found]}


def compare_with_published(config: Config) -> dict[str, Any]:
    """Fit the constants to one published run, predict the others, and print the errors: of whole runs, and of their
    first hundred steps."""
    from owpo_megatron.config import hf_folder
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.plan.published import PARTS, compare

    model = read_hf_config(hf_folder(config.model.path))
    written: dict[str, Any] = {}
    for part in PARTS:
        fitted, rows = compare(config, model, part)
        machine, lengths = fitted.machine, fitted.lengths(rows[0].most)
        out.print(f"[bold]{part} steps[/]")
        out.print(_published(rows))
        out.print(
            f"fitted to the first row: lengths {lengths}, {machine.decoding:.3f} of bandwidth and peak while decoding, "
            f"{machine.logprobs:.2f} times its FLOPs for a pass for log-probs; {machine.mfu:.2f} of the peak is a guess"
        )
        constants = {"lengths": lengths, "decoding": machine.decoding, "logprobs": machine.logprobs, "mfu": machine.mfu}
        compared = [
            {"published": vars(one.row), "fitted": one.fitted, "error": one.error} | one.simulated.as_dict()
            for one in rows
        ]
        written[part] = {"constants": constants, "rows": compared}
    return written


def _table(found: Sequence[Simulated]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("GPUs", "engines", "step s", *PHASES, "generation", "idle", "staleness", "GB sent per GPU"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            str(one.gpus),
            "in turns" if one.shared else f"beside, {one.engine_gpus}",
            f"{one.seconds['total']:.1f}",
            *(f"{one.seconds[name]:.1f}" for name in PHASES),
            f"{one.generation_seconds:.1f}",
            f"{one.idle['all']:.0%}",
            f"{one.staleness['mean']:.2f}",
            f"{sum(one.bytes_per_gpu.values()) / 1e9:.0f}",
        )
    return table


def _published(rows: Sequence[Compared]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("GPUs", "engines", "published s", "simulated s", "error", "rollout", "old_logp", "update"):
        table.add_column(name, justify="right")
    for one in rows:
        row, seconds = one.row, one.simulated.seconds
        published = (row.generation, row.old_logp or 0.0, row.update)
        table.add_row(
            str(row.gpus),
            "in turns" if row.shared else "beside",
            f"{row.step:.1f}",
            f"{seconds['total']:.1f}",
            "fitted" if one.fitted else f"{one.error:+.0%}",
            *(
                f"{then:.0f} / {seconds[name]:.0f}"
                for then, name in zip(published, ("rollout", "old_logp", "update"), strict=True)
            ),
        )
    return table
