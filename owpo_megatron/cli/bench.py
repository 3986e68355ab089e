"""owpo bench: measure parts of the stack on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from owpo_megatron.cli.options import JsonFile, err, out, wide
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.bench.result import BenchResult

bench = typer.Typer(no_args_is_help=True, help="Measure parts of the stack on this machine.")


@bench.callback()
def _frame() -> None:
    """Measure parts of the stack on this machine. Every result includes the machine and the versions used."""


@bench.command("swap")
def swap(
    params: Annotated[str, typer.Option(metavar="COUNT", help="Size of the random model, e.g. 50M or 1.5B.")] = "50M",
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Dtype whose result is summarised; the table has both.")
    ] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Timed swaps and copies; results are medians.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Time the hard swap of the reference against a contiguous copy of the same bytes.

    Example: owpo bench swap --params 50M --json swap.json
    """
    count = _count(params)
    from owpo_megatron.bench.swap import bench_swap

    with progress("swap") as log:
        figures = bench_swap(count, dtype, rounds, log)
    report_rows(figures.pop("rows"), json_file, figures)


@bench.command("sync")
def sync(
    transport: Annotated[
        str,
        typer.Option(help="all, or a comma-separated list of tensor, tensor_by_value, distributed, disk, delta, ipc."),
    ] = "all",
    params: Annotated[str, typer.Option(metavar="COUNT", help="Size of the random model, e.g. 50M or 8B.")] = "50M",
    engine: Annotated[Literal["sglang"], typer.Option(help="Engine that receives the weights.")] = "sglang",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Dtype of the weights.")] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device of weights and engine.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Timed pushes per transport; results are medians.")] = 7,
    bucket_mb: Annotated[int, typer.Option(min=1, help="Bucket size in MB, see sync.bucket_mb.")] = 512,
    changed: Annotated[
        float, typer.Option(min=0, max=100, help="Percent of the elements changed before each push by delta.")
    ] = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Time pushing a model's weights to an SGLang server, by each transport, against a plain copy of the same bytes.

    Example: owpo bench sync --transport all --params 50M --engine sglang --json sync.json
    """
    from owpo_megatron.bench.sync import NAMES, bench_sync

    here = [name for name in NAMES if name != "ipc" or device == "cuda"]
    names = here if transport == "all" else transport.split(",")
    if unknown := set(names) - set(NAMES):
        raise UserError("--transport", ", ".join(sorted(unknown)), f"use all, or some of {', '.join(NAMES)}")
    with progress("sync") as log:
        rows = bench_sync(_count(params), dtype, names, device, rounds, bucket_mb, changed / 100, log)
    report_rows(rows, json_file, {"engine": engine, "dtype": dtype, "bucket_mb": bucket_mb, "changed": changed})


@bench.command("checks")
def checks(
    params: Annotated[str, typer.Option(metavar="COUNT", help="Size of the random model, e.g. 10M.")] = "10M",
    tokens: Annotated[int, typer.Option(min=64, help="Response tokens of a step.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of all measurements in turn; results are medians.")] = 5,
    every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Time a run's checks and its checkpoints against the update of a step.

    Example: owpo bench checks --params 10M --json checks.json
    """
    count = _count(params)
    from owpo_megatron.bench.checks import bench_checks

    with progress("checks") as log:
        row = bench_checks(count, tokens, rounds, every, log)
    report_rows([row], json_file, {"percent": row["percent"]})


@bench.command("client")
def client(
    responses: Annotated[int, typer.Option(min=1, help="Responses of the step that is measured.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 8192,
    recorded: Annotated[
        Path | None, typer.Option(metavar="FILE", help="rollouts/step_N.jsonl of a run, instead of random responses.")
    ] = None,
    in_flight: Annotated[
        int,
        typer.Option(min=1, metavar="COUNT", help="Requests in flight at a time, in a last row of short responses."),
    ] = 2000,
    json_file: JsonFile = None,
) -> None:
    """Measure what a step's tokens cost global rank 0: requests to a fake server, packing, broadcast, saving.

    Example: owpo bench client --responses 64 --tokens 8192 --json client.json
    """
    from owpo_megatron.bench import client as client_bench

    if recorded is not None and not recorded.is_file():
        raise UserError("--recorded", recorded, "no such file; give rollouts/step_N.jsonl of a run")
    with progress("client") as log:
        if recorded is None:
            rollouts = client_bench.made_rollouts(responses, tokens)
        else:
            rollouts = client_bench.recorded_rollouts(recorded, responses)
        rows = client_bench.bench_client(rollouts, log)
        rows.append(client_bench.bench_in_flight(in_flight, log))
    report_rows(rows, json_file, client_bench.figures(rows))


@bench.command("verifier")
def verifier(
    workers: Annotated[int, typer.Option(min=1, help="Grading processes; one is measured as well.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Time limit for grading one answer, in seconds.")] = 4.0,
    fuzz: Annotated[int, typer.Option(min=0, metavar="COUNT", help="Grade this many random inputs instead.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the generated answers.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Compare verifications per second with calling math-verify directly; then time a batch with adversarial answers.

    Example: owpo bench verifier --workers 4
    """
    from owpo_megatron.bench import verifier as verifier_bench

    with progress("verifier") as log:
        if fuzz:
            rows = verifier_bench.fuzz(fuzz, workers, timeout, seed, log)
        else:
            rows = verifier_bench.measure(sorted({1, workers}), timeout, seed, log)
    report_rows(rows, json_file)


@bench.command("convert")
def convert(
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Working folder; default: a temporary folder in this one.")
    ] = None,
    layers: Annotated[
        int, typer.Option(min=1, help="Layers of Qwen2.5-1.5B's shape; 28 give all 1.5 B parameters.")
    ] = 28,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Convert, verify and export a random checkpoint of Qwen2.5-1.5B's shape, against a plain copy of its files.

    Reports seconds, MB/s and peak memory of each step. Needs 10 GB of free disk space while it runs.

    Example: owpo bench convert --layers 4
    """
    import tempfile

    from owpo_megatron.bench.convert import measure

    with progress("convert") as log, tempfile.TemporaryDirectory(dir=folder or Path.cwd()) as scratch:
        rows = list(measure(Path(scratch), layers, jobs, log))
    report_rows(rows, json_file)


@bench.command("head")
def head(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to measure on.")] = "cpu",
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="TxHxV,...",
            help="Tokens x hidden size x vocabulary. Default: 512x256x16384 on a CPU, "
            "four shapes of models in use on CUDA.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs per implementation; results are medians.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one per core.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also plot times and memory to this file.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Time forward and backward of the LM head, ours against others, with a gradient in 100, 60 and 40 % of the rows.

    On a CPU the others are dense log_softmax with autograd, eager and compiled. On CUDA they are all installed peers,
    with the GEMMs alone as the upper bound. Every row is printed, and written to --json, as soon as it is measured.

    Example: owpo bench head --shapes 4096x512x32768 --json head.json
    """
    import os

    import torch

    from owpo_megatron.bench import head as on_cpu
    from owpo_megatron.methods import make_method

    method, chosen = make_method("owpo"), _shapes(shapes) if shapes else None
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device", device, "torch sees no CUDA device here; use --device cpu")
        from owpo_megatron.bench import head_cuda, head_peers

        measured = head_cuda.measure(method, chosen or head_cuda.SHAPES, peers=head_peers.installed())
    else:
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        measured = on_cpu.measure_shapes(method, chosen or on_cpu.SHAPES, repeats)
    rows = []
    for row in measured:
        rows.append(row)
        err.print(f"head: {_line(row)}", highlight=False)
        if json_file is not None:
            _result(rows).write(json_file)
    report_rows(rows, json_file)
    if plot is not None:
        from owpo_megatron.report.head_plot import write_head_plot

        write_head_plot(rows, plot)
        out.print(f"written: {escape(str(plot))}")


@contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """Show the current stage of a benchmark: in place on a terminal, a line for each otherwise."""
    if not err.is_terminal:
        yield lambda text: err.print(f"{name}: {text}", highlight=False)
        return
    with err.status(name) as status:
        yield lambda text: status.update(f"{name}: {text}")


def _count(text: str) -> int:
    """Parse a number with a unit: 50M is 50000000."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    number, unit = (text[:-1], units[text[-1:].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError as error:
        raise UserError("--params", text, "write a number followed by K, M or B, e.g. 50M") from error


def _shapes(text: str) -> list[tuple[int, int, int]]:
    """Parse "4096x512x32768,1024x896x151936"."""
    try:
        found = [tuple(int(size) for size in one.split("x")) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or any(len(one) != 3 or min(one) < 2 for one in found):
        raise UserError("--shapes", text, "write tokens x hidden x vocabulary, e.g. 4096x512x32768,1024x896x151936")
    return [(tokens, hidden, vocab) for tokens, hidden, vocab in found]


def _line(row: Mapping[str, Any]) -> str:
    shape = "x".join(str(row[name]) for name in ("tokens", "hidden", "vocab"))
    took = row.get("error") or (f"{row['ms']:.3g} ms" if "ms" in row else f"{row['seconds']:.3g} s")
    return f"{shape} {row['impl']}, {row.get('work', 'loss and gradients')}, {row['density']:.0%} of the rows: {took}"


def _result(rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Any] | None = None) -> BenchResult:
    from owpo_megatron.bench.result import BenchResult
    from owpo_megatron.launch.machine import machine, versions

    return BenchResult(machine(), versions(), shlex.join(["owpo", *sys.argv[1:]]), rows, figures or {})


def report_rows(
    rows: Sequence[Mapping[str, Any]], json_file: Path | None, figures: Mapping[str, Any] | None = None
) -> None:
    """Print a benchmark's rows and write them with machine and versions; `figures` go to the top of the JSON."""
    result = _result(rows, figures)
    wide().print(result.table())
    if json_file is not None:
        result.write(json_file)
        out.print(f"written: {escape(str(json_file))}")
