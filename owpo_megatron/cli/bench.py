"""owpo bench: what parts of the stack cost on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import track

from owpo_megatron.cli.options import JsonFile, err, out, wide
from owpo_megatron.errors import UserError

bench = typer.Typer(no_args_is_help=True, help="Measure parts of the stack on this machine.")


@bench.callback()
def _frame() -> None:
    """Measure parts of the stack on this machine. Every result carries machine and versions."""


@bench.command("swap")
def swap(
    params: Annotated[str, typer.Option(metavar="COUNT", help="Size of the random model, e.g. 50M or 1.5B.")] = "50M",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the figures at the top.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Swaps and copies that are timed; medians are given.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Time the hard swap of the reference against a contiguous copy of the same bytes, in one run.

    Example: owpo bench swap --params 50M --json swap.json
    """
    count = _count(params)
    from owpo_megatron.bench.swap import bench_swap

    figures = bench_swap(count, dtype, rounds)
    report_rows(figures.pop("rows"), json_file, figures)


@bench.command("sync")
def sync(
    transport: Annotated[
        str,
        typer.Option(
            help="all, or some of tensor, tensor_by_value, distributed, disk, delta, ipc, with commas between."
        ),
    ] = "all",
    params: Annotated[str, typer.Option(metavar="COUNT", help="Size of the random model, e.g. 50M or 8B.")] = "50M",
    engine: Annotated[Literal["sglang"], typer.Option(help="What the weights are brought to.")] = "sglang",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where weights and engine are.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Pushes by each that are timed; medians are given.")] = 7,
    bucket_mb: Annotated[int, typer.Option(min=1, help="As sync.bucket_mb.")] = 512,
    changed: Annotated[
        float, typer.Option(min=0, max=100, help="Of delta: percent of the elements that change before each push.")
    ] = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Bring a model's weights to an SGLang server by each transport, against a plain copy of the same bytes.

    Example: owpo bench sync --transport all --params 50M --engine sglang --json sync.json
    """
    from owpo_megatron.bench.sync import TRANSPORTS, bench_sync

    here = [name for name in TRANSPORTS if name != "ipc" or device == "cuda"]
    names = here if transport == "all" else transport.split(",")
    if unknown := set(names) - set(TRANSPORTS):
        raise UserError("--transport", ", ".join(sorted(unknown)), f"use all, or some of {', '.join(TRANSPORTS)}")
    with err.status("sync") as status:
        rows = bench_sync(_count(params), dtype, names, device, rounds, bucket_mb, changed / 100, status.update)
    report_rows(rows, json_file, {"engine": engine, "dtype": dtype, "bucket_mb": bucket_mb, "changed": changed})


@bench.command("verifier")
def verifier(
    workers: Annotated[int, typer.Option(min=1, help="Measured with 1 and with this many grading processes.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds from the start of grading one answer.")] = 4.0,
    fuzz: Annotated[int, typer.Option(min=0, metavar="COUNT", help="Grade this many random inputs instead.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the made answers.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Verifications a second against math-verify called directly, and a batch with hostile answers in it."""
    from owpo_megatron.bench import verifier as verifier_bench

    with err.status("verifier") as status:
        if fuzz:
            rows = verifier_bench.fuzz(fuzz, workers, timeout, seed, status.update)
        else:
            rows = verifier_bench.measure(sorted({1, workers}), timeout, seed, status.update)
    report_rows(rows, json_file)


@bench.command("convert")
def convert(
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to work; default: a temporary folder in this one.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of Qwen2.5-1.5B's shape: 28 are the 1.5 B parameters.")] = 28,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a core.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Convert a random checkpoint of Qwen2.5-1.5B's shape, prove it and export it, beside a plain copy of its files.

    Seconds, MB/s and the largest resident memory of each. Needs 10 GB of free disk, which it frees again.
    """
    import tempfile

    from owpo_megatron.bench.conversion import measure

    with err.status("convert") as status, tempfile.TemporaryDirectory(dir=folder or Path.cwd()) as scratch:
        rows = list(measure(Path(scratch), layers, jobs, status.update))
    report_rows(rows, json_file)


@bench.command("head")
def head(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Rows of hidden states. CPU: 4096; CUDA: a list of shapes.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size. CPU: 512.")] = None,
    vocab: Annotated[int | None, typer.Option(min=2, help="Vocabulary. CPU: 32768.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; the median is given.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: every core.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw times and memory, too.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Forward and backward of the LM head, ours against others, with 100, 60 and 40 % of the rows having a gradient.

    On a CPU: dense log_softmax with autograd, and torch.compile of it. On CUDA: every installed peer, and the GEMMs.
    """
    import os

    import torch

    from owpo_megatron.bench.head import DENSITIES, HeadProblem, measure
    from owpo_megatron.methods import make_method

    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device", device, "torch sees no CUDA device here; use --device cpu")
        from owpo_megatron.bench import head_cuda, head_peers
        from owpo_megatron.mcore.cross_entropy import one_rank_cross_entropy

        shapes = head_cuda.SHAPES if tokens is None else ((tokens, hidden or 4096, vocab or 151936),)
        peers = (*head_peers.PEERS, head_peers.megatron(one_rank_cross_entropy()))
        measured = head_cuda.measure(make_method("owpo"), shapes, peers=peers)
        count = None
    else:
        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        problem = HeadProblem.random(tokens or 4096, hidden or 512, vocab or 32768)
        measured = measure(problem, make_method("owpo"), repeats=repeats)
        count = len(DENSITIES) * 3
    rows = list(track(measured, "head", total=count, console=err, transient=True))
    report_rows(rows, json_file)
    if plot is not None:
        from owpo_megatron.report.head_plot import write_head_plot

        write_head_plot(rows, plot)
        out.print(f"written: {escape(str(plot))}")


def _count(text: str) -> int:
    """50M -> 50000000."""
    units = {"K": 10**3, "M": 10**6, "B": 10**9}
    number, unit = (text[:-1], units[text[-1:].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        return int(float(number) * unit)
    except ValueError as error:
        raise UserError("--params", text, "write a number with K, M or B behind it, e.g. 50M") from error


def report_rows(
    rows: Sequence[Mapping[str, Any]], json_file: Path | None, figures: Mapping[str, Any] | None = None
) -> None:
    """Print a benchmark's rows and write them with what they depend on; `figures` stand at the top of the JSON."""
    from owpo_megatron.bench.table import BenchResult
    from owpo_megatron.launch.machine import machine, versions

    command = shlex.join(["owpo", *sys.argv[1:]])
    result = BenchResult(machine(), versions(), command, rows, figures or {})
    wide().print(result.table())
    if json_file is not None:
        result.write(json_file)
        out.print(f"written: {escape(str(json_file))}")
