"""owpo coverage and owpo drift: what training gained and lost against the base model, and where its update went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, out


def coverage(
    base: Annotated[Path, typer.Argument(metavar="BASE.jsonl", help="Evaluation of the base model.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL.jsonl", help="Evaluation of the trained one.")],
    tokenizer: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Model whose tokenizer made them.")] = None,
    ids: Annotated[bool, typer.Option("--ids", help="List the problems gained and lost.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Count the problems that a model solves and its base does not, and the reverse, in one of their samples each.

    With a tokenizer the entropy is that of the answers, else of the whole responses (kept with eval.keep_responses).

    Example: owpo coverage base/aime24.jsonl runs/a/eval/step_40/aime24.jsonl
    """
    from owpo_megatron.report.coverage import coverage as compare
    from owpo_megatron.report.coverage import read_problems

    lines = [read_problems(base), read_problems(model)]
    if tokenizer is not None:
        from owpo_megatron.data import load_tokenizer
        from owpo_megatron.evaluation.answers import with_answers

        loaded = load_tokenizer(tokenizer)
        lines = [with_answers(one, loaded) for one in lines]
    found = compare(*lines)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_row("problems", str(found.problems))
    table.add_row("samples per problem", str(found.base_samples))
    table.add_row("solved by both", str(found.both))
    table.add_row("gained", str(len(found.gained)))
    table.add_row("lost", str(len(found.lost)))
    table.add_row("solved by neither", str(found.neither))
    table.add_row("retained", f"{found.retained:.1%} of the base's")
    for name, value in (("base", found.base_entropy), ("model", found.model_entropy)):
        table.add_row(f"entropy of answers, {name}", "no responses kept" if value is None else f"{value:.3f} nats")
    out.print(table)
    if ids:
        out.print(f"gained: {escape(', '.join(found.gained)) or '-'}")
        out.print(f"lost: {escape(', '.join(found.lost)) or '-'}")
    _write(json_file, found.to_json())


def drift(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Hugging Face folder.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Later weights of the same model.")],
    leading: Annotated[int, typer.Option(min=1, help="Leading singular directions.")] = 16,
    json_file: JsonFile = None,
) -> None:
    """Show how many weights of each matrix changed in bf16, and the share of the update in its principal directions.

    Example: owpo drift cache/quickstart/cipher runs/a/hf
    """
    from owpo_megatron.report.drift import drift as compare

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("matrix")
    for name in ("changed", "update norm", "principal", "by chance", "rotation", "spectrum"):
        table.add_column(name, justify="right")
    lines = list(compare(old, new, leading))
    for one in lines:
        shares = (f"{value:.2%}" for value in (one.changed, one.update_norm, one.principal, one.by_chance))
        table.add_row(escape(one.name), *shares, f"{one.rotation:.2e}", f"{one.spectrum:.2e}")
    out.print(table)
    _write(json_file, [one.to_json() for one in lines])


def _write(file: Path | None, content: dict[str, Any] | Sequence[Any]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
        out.print(f"written: {escape(str(file))}")
