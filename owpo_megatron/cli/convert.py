"""owpo convert: models between HF folders and megatron folders, with the proof that both compute the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from owpo_megatron.cli.options import JsonFile, err, note, out
from owpo_megatron.errors import UserError
from owpo_megatron.hub import model_folder

if TYPE_CHECKING:
    from owpo_megatron.run.manifest import Conversion

convert = typer.Typer(no_args_is_help=True, help="Convert models between HF and megatron folders, and prove it.")

Jobs = Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")]
HFTemplate = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="HF folder with config and tokenizer, where the megatron side has lost its own."),
]


@convert.command("import")
def import_hf(
    hf: Annotated[
        Path, typer.Option(metavar="DIR", help="HF folder (.safetensors or .bin), or OWNER/NAME on the hub.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Megatron folder to make.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Dtype of the result; default: that of the HF weights."),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Refuse a model that does not fit this tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="The same for pipeline parallelism.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="The same for expert parallelism.")] = 1,
    jobs: Jobs = None,
    prove: Annotated[bool, typer.Option(help="Prove the result; training refuses a folder without a proof.")] = True,
    json_file: JsonFile = None,
) -> None:
    """HF folder -> megatron folder, which `model.path` takes at any parallel sizes: --tp, --pp, --ep only check.

    Run it again to go on with an interrupted conversion. Example: owpo convert import --hf Qwen3-8B --out Qwen3-8B-mg
    """
    hf = model_folder(hf, "--hf", note)
    _check_folders("--hf", hf, out_dir)
    _stay_on_the_cpu()
    from owpo_megatron.config import ParallelConfig
    from owpo_megatron.families import check_parallel, read_hf_config

    check_parallel(read_hf_config(hf), ParallelConfig(tp=tp, pp=pp, dp=ep, ep=ep, sp=tp > 1))
    from owpo_megatron.conversion.export import hf_to_megatron  # torch: an unknown model is refused before

    with _bars() as stage:
        conversion = hf_to_megatron(hf, out_dir, dtype, stage, jobs, prove)
    _report(conversion, f"written: {out_dir}", json_file)


@convert.command("export")
def export_hf(
    megatron: Annotated[Path, typer.Option(metavar="DIR", help="Converted folder, or a run's best/ or step_N folder.")],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="HF folder to make.")],
    hf_template: HFTemplate = None,
    jobs: Jobs = None,
    prove: Annotated[bool, typer.Option(help="Prove the result.")] = True,
    json_file: JsonFile = None,
) -> None:
    """Megatron folder, or a run's policy, -> HF folder with tokenizer, generation config and chat template.

    Example: owpo convert export --megatron runs/NAME/checkpoints/step_000080 --out step80
    """
    _check_folders("--megatron", megatron, out_dir)
    _stay_on_the_cpu()
    from owpo_megatron.conversion.export import megatron_to_hf
    from owpo_megatron.run.layout import MANIFEST
    from owpo_megatron.run.sealed import fault_of

    if (megatron / MANIFEST).is_file() and (fault := fault_of(megatron)) is not None:
        raise UserError("megatron", megatron, f"is damaged: {fault}; use another checkpoint")
    with _bars() as stage:
        conversion = megatron_to_hf(megatron, out_dir, hf_template, stage, jobs, prove)
    _report(conversion, f"written: {out_dir}", json_file)


@convert.command("verify")
def verify(
    megatron: Annotated[Path, typer.Option(metavar="DIR", help="Converted folder, or a run's best/ or step_N folder.")],
    hf: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="HF folder; default: the hashes recorded by the conversion."),
    ] = None,
    hf_template: HFTemplate = None,
    jobs: Jobs = None,
    json_file: JsonFile = None,
) -> None:
    """Prove a megatron folder again: every tensor's bits, and the logits of transformers against megatron-core's.

    The outcome goes to the folder's conversion.json; exit code 1 where the two sides differ.
    """
    _check_folders("--megatron", megatron)
    _stay_on_the_cpu()
    from owpo_megatron.conversion.export import verify as verify_folder

    with _bars() as stage:
        conversion = verify_folder(megatron, hf, hf_template, stage, jobs)
    _report(conversion, f"verified: {megatron}", json_file)


def _stay_on_the_cpu() -> None:
    """Everything stays in host memory, wherever this runs; compiling takes longer there than it saves."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _check_folders(option: str, source: Path, target: Path | None = None) -> None:
    """Check the folders before torch is imported. Raises UserError."""
    if not source.is_dir():
        raise UserError(option, source, "no such folder")
    if target is not None and target.exists():
        raise UserError("--out", target, "exists already; choose another folder or remove it")


def _report(conversion: Conversion, line: str, json_file: Path | None) -> None:
    proof = conversion.proof
    out.print(escape(line))
    if proof is None:
        out.print("not proved; run owpo convert verify")
    else:
        out.print(
            f"proved: {proof.tensors} tensors bit for bit; logits of {proof.tokens} tokens at most "
            f"{proof.largest_difference:.2g} apart ({proof.tolerance:.2g} allowed)"
        )
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(conversion), indent=1) + "\n")
        out.print(f"written: {escape(str(json_file))}")


@contextmanager
def _bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Progress of the stages: a bar for each on a terminal, a line for each elsewhere."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:

        def stage(name: str) -> Callable[[int, int], None]:
            bar = bars.add_task(name, total=None)
            return lambda done, total: bars.update(bar, completed=done, total=total)

        try:
            yield stage
        except KeyboardInterrupt:
            err.print("interrupted: the same command goes on with what is done")
            raise
